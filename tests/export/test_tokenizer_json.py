from __future__ import annotations

import random
from pathlib import Path

import pytest
import sentencepiece
import transformers  # which imports a class where it is first named

from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.training import train_tokenizer
from megalibi.errors import DataError
from megalibi.export.portable_tokenizer import ODD_TEXTS, check_portable
from megalibi.export.tokenizer_json import write_hf_tokenizer

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
OTHER_TEXT = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
BITS = [
    "a",
    "b",
    " ",
    "   ",
    "\u2581",
    "\n",
    "\t",
    "é",
    "e\u0301",
    "日本",
    "</s>",
    "<unk>",
    "<0x41>",
    "19",
    "the",
    "ing",
    "===",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_tokenizer([TEXT], 700, path)
    return path


def test_transformers_gives_the_same_ids_and_the_text_back(model: Path, tmp_path: Path) -> None:
    write_hf_tokenizer(model, tmp_path, max_length=1 << 20)
    ours, theirs = Tokenizer(model), transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    draw = random.Random(0)
    texts = [*ODD_TEXTS, TEXT, OTHER_TEXT]
    texts += ["".join(draw.choices(BITS, k=draw.randrange(60))) for _ in range(400)]
    texts += ["".join(map(chr, draw.choices(range(0xD800), k=40))) for _ in range(100)]
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text), text
        assert theirs.decode(ids) == text
    assert (theirs.eos_token_id, len(theirs)) == (ours.end_of_document_id, ours.vocab_size)
    assert theirs.decode([*ours.encode("the end"), ours.end_of_document_id], skip_special_tokens=True) == "the end"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "is no byte-pair encoding"),
        ({"add_dummy_prefix": True}, "changes texts before it cuts them"),
        ({"normalization_rule_name": "nfkc"}, "changes texts before it cuts them"),
        ({"byte_fallback": False}, "has no byte pieces"),
        ({"user_defined_symbols": ["house"]}, "has pieces of its user"),
    ],
)
def test_what_cannot_be_exact_is_refused(tmp_path: Path, options: dict[str, object], reason: str) -> None:
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    defaults = {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "bos_id": -1,
        "remove_extra_whitespaces": False, "add_dummy_prefix": False, "minloglevel": 2, "vocab_size": 400,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "t"), **{**defaults, **options}
    )
    with pytest.raises(DataError, match=reason):
        write_hf_tokenizer(tmp_path / "t.model", tmp_path, max_length=8)
    with pytest.raises(DataError, match=f"cannot become a GGUF file .* {reason}"):
        check_portable(Tokenizer(tmp_path / "t.model"), "a GGUF file")


def test_words_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.words").write_text("<s> 0\n<pad> 0\n</s> 0\n<unk> 0\na 3\nb 2\nc 1\nd 1\n")
    with pytest.raises(DataError, match="a word-level vocabulary"):
        write_hf_tokenizer(tmp_path / "t.words", tmp_path, max_length=8)
