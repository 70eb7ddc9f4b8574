from __future__ import annotations

import hashlib
import io
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.training import train_tokenizer
from megalibi.errors import ConfigError, DataError

# Text that looks like text, and text that looks like trouble.
texts = st.text(
    st.one_of(
        st.sampled_from(" \n\t\r▁.abcdefXYZ019</s>éß日𝄞\u00a0\u200b\ufeff\x00"),
        st.characters(exclude_categories=["Cs"]),
    )
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return Tokenizer(tokenizer_path)


@given(texts)
@example("")
@example("  two\n\n  spaces  \n")
@example("</s><unk><0x0A>▁ ▁▁x▁")
@example("def f(x):\r\n\treturn x  # ﬁn\n")
def test_decoding_gives_back_every_text(tokenizer_path, text):
    tokenizer = Tokenizer(tokenizer_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(texts)
@example("</s>▁ ▁x\n")
def test_the_bytes_of_every_text(tokenizer_path, text):
    tokenizer = Tokenizer(tokenizer_path)
    assert tokenizer.is_exact
    ids = np.array(tokenizer.encode(text), np.int64)
    assert tokenizer.text_bytes[ids].sum() == len(text.encode())
    assert tokenizer.text_bytes[tokenizer.end_of_document_id] == 0


def test_long_texts_are_encoded_as_sentencepiece_does_at_once(tokenizer, tokenizer_path, english):
    bare = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    text = "\n".join(english) + " " * 3000 + "a" * 3000 + "\n    x" * 900
    assert tokenizer.can_cut
    assert tokenizer.encode(text) == bare.encode(text)


CHINESE = "\u7684\u4e00\u662f\u4e0d\u4e86\u4eba\u6211\u5728\u6709\u4ed6\u8fd9\u4e2d\u5927\u6765\u4e0a\u56fd\uff0c\u3002"


def chinese(num_characters: int, seed: int = 0) -> str:
    """Text without a space, in which some characters often stand side by side."""
    generator = random.Random(seed)
    text = ""
    while len(text) < num_characters:
        text += CHINESE[2 * (place := generator.randrange(8)) : 2 * place + 2] if generator.random() < 0.7 else "\uff0c"
        text += generator.choice(CHINESE) if generator.random() < 0.2 else ""
    return text[:num_characters]


@pytest.fixture(scope="module")
def chinese_path(tmp_path_factory, english):
    path = tmp_path_factory.mktemp("chinese") / "chinese.model"
    train_tokenizer([chinese(20_000), *english[:5]], 600, path)
    return path


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def foreign_tokenizer(request, tmp_path_factory, english):
    """Without our options, but for those that keep a text as it is."""
    options = {"model_type": request.param, "normalization_rule_name": "identity", "byte_fallback": True}
    options |= {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "hard_vocab_limit": False}
    path = tmp_path_factory.mktemp("foreign") / "foreign.model"
    path.write_bytes(train_foreign([chinese(20_000).replace("\uff0c", "\n"), *english[:5]], **options))
    return Tokenizer(path)


@given(
    text=st.text(st.sampled_from(CHINESE + " \n\u2581abcth.9\u3042\U0001d11e"), max_size=80),
    max_characters=st.integers(1, 20),
)
def test_a_cut_changes_no_id(foreign_tokenizer, text, max_characters):
    assert foreign_tokenizer.can_cut
    pieces = list(foreign_tokenizer.cut(text, max_characters))
    assert "".join(pieces) == text
    (whole,) = foreign_tokenizer._encode_strings([text])
    assert [token for ids in foreign_tokenizer._encode_strings(pieces) for token in ids] == whole


def test_text_without_spaces_is_cut(chinese_path):
    """Its pieces are short, so that neither memory nor time grow with a document."""
    text = chinese(200_000, seed=1)
    tokenizer = Tokenizer(chinese_path)
    pieces = list(tokenizer.cut(text, 1_000))
    assert max(map(len, pieces)) <= 1_000
    assert len(pieces) < 250
    bare = sentencepiece.SentencePieceProcessor(model_file=str(chinese_path))
    assert tokenizer.encode(text) == bare.encode(text)


@pytest.mark.parametrize("rule", ["nfkc", "nfkc_cf", "nmt_nfkc"])
def test_a_normalizer_changes_texts_and_forbids_cuts_between_characters(tmp_path, english, rule):
    """It may join what a cut has parted: a letter and its accent."""
    options = {"normalization_rule_name": rule, "byte_fallback": True, "model_type": "bpe", "add_dummy_prefix": False}
    model = train_foreign(english, **options, remove_extra_whitespaces=False)
    (tmp_path / "a.model").write_bytes(model)
    text = "e\u0301" * 50
    tokenizer = Tokenizer(tmp_path / "a.model")
    assert list(tokenizer.cut(text, 3)) == [text]
    assert not tokenizer.is_exact
    assert tokenizer.count_lost("\ufb01ne \u2460", tokenizer.encode("\ufb01ne \u2460")) == 2


def test_encode_batch_is_encode_of_each(tokenizer, english):
    batch = [english[0], "", "▁", english[1][:50]]
    assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]


def test_end_of_document_is_no_text(tokenizer):
    assert 0 <= tokenizer.end_of_document_id < tokenizer.vocab_size == 2000
    assert tokenizer.decode([*tokenizer.encode("a b"), tokenizer.end_of_document_id]) == "a b"
    assert tokenizer.end_of_document_id not in tokenizer.encode("</s>")


def test_fingerprint(tokenizer, tokenizer_path):
    assert tokenizer.fingerprint == hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()


def test_training_is_deterministic(tmp_path, english):
    for name in ("a", "b"):
        train_tokenizer(iter(english), 600, tmp_path / name, max_sentences=200)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("vocab_size", [262, 50_000])
def test_a_vocabulary_that_the_text_does_not_give(tmp_path, english, vocab_size):
    with pytest.raises(ConfigError, match=f"--vocab-size={vocab_size}: must fit the text, .*ocabulary") as error:
        train_tokenizer(english[:3], vocab_size, tmp_path / "a")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 0}, "--vocab-size=0: must be above 258, "),
        ({"vocab_size": 258}, "--vocab-size=258: must be above 258"),
        ({"character_coverage": 2.0}, "--character-coverage=2.0: must be a share from 0.98 to 1"),
        ({"character_coverage": 0.0}, "--character-coverage=0.0: must be a share"),
        ({"character_coverage": float("nan")}, "--character-coverage=nan: must be a share"),
        ({"max_sentences": 0}, "--max-sentences=0: must be at least 1"),
    ],
)
def test_arguments_that_are_not_allowed(tmp_path, english, arguments, message):
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(english[:3], **{"vocab_size": 400, "output": tmp_path / "a", **arguments})
    assert list(tmp_path.iterdir()) == []


def test_no_text(tmp_path):
    with pytest.raises(DataError, match="there is no text"):
        train_tokenizer([], 600, tmp_path / "a")


LONG = {"words": "aGVsbG8gd29ybGQ" * 80_000, "lines": ("\u3042" * 400 + "\n") * 1_000}


@pytest.mark.parametrize("kind", ["chinese", *LONG])
def test_long_text_without_spaces_is_learned_from(tmp_path, english, kind):
    """Of more than a megabyte without one, sentencepiece would leave out every byte."""
    text = chinese(400_000) if kind == "chinese" else LONG[kind]
    assert len(text.encode()) > 1 << 20
    learned = train_tokenizer([*english[:5], text], 700, tmp_path / "with.model")
    assert learned.used == learned.sentences >= len(text) / 2_048
    assert learned.describe() == f"learned from all {learned.sentences:,} sentences"
    train_tokenizer(english[:5], 700, tmp_path / "without.model")
    with_text, without = (len(Tokenizer(tmp_path / f"{name}.model").encode(text)) for name in ("with", "without"))
    assert with_text < without / 2


@pytest.mark.parametrize("spaces", [0, 1, 3])
def test_spaces_are_kept_even_if_the_text_has_few_or_none(tmp_path, spaces):
    text = chinese(60_000)
    for number in range(spaces):
        text = text[: number * 1_000] + " " + text[number * 1_000 :]
    train_tokenizer([text], 500, tmp_path / "a.model")
    tokenizer = Tokenizer(tmp_path / "a.model")
    assert tokenizer.is_exact
    assert tokenizer.can_cut
    for some in ("  a b\n ", CHINESE, " " + CHINESE[:2] + "  " + CHINESE[3:]):
        assert tokenizer.decode(tokenizer.encode(some)) == some


def test_what_is_not_learned_from_is_said(tmp_path, english):
    learned = train_tokenizer(english, 600, tmp_path / "a.model", max_sentences=100)
    assert learned.used == 100 < learned.sentences
    assert (
        learned.describe() == f"learned from 100 of {learned.sentences:,} sentences, drawn at random (--max-sentences)"
    )


def test_a_sign_that_sentencepiece_reserves_leaves_out_nothing_but_itself(tmp_path, english):
    """sentencepiece leaves out whole sentences that hold one."""
    marked = ["\u2585".join(english[:20])]
    learned = train_tokenizer(marked, 600, tmp_path / "marked.model")
    train_tokenizer(english[:20], 600, tmp_path / "plain.model")
    assert learned.describe().endswith("; left out 19 signs U+2585, which sentencepiece keeps for itself")
    assert (tmp_path / "marked.model").read_bytes() == (tmp_path / "plain.model").read_bytes()
    text = english[0] + "\u2585" + english[1]
    tokenizer = Tokenizer(tmp_path / "marked.model")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lost_characters_are_counted(tmp_path, english):
    """By a tokenizer without bytes for what it does not know, and without line ends."""
    (tmp_path / "a.model").write_bytes(train_foreign(english, normalization_rule_name="identity"))
    tokenizer = Tokenizer(tmp_path / "a.model")
    for text, lost in (("the same", 0), ("\u65e5the\u672c \u8a9e", 3), ("a\nb\nc", 2), ("two  spaces", 1), ("", 0)):
        assert tokenizer.count_lost(text, tokenizer.encode(text)) == lost, text


def test_nothing_is_lost_of_any_text_by_our_own(tokenizer):
    text = "\u65e5\u2581\n\t  \x00\u2585"
    assert tokenizer.count_lost(text, tokenizer.encode(text)) == 0


def test_a_damaged_model(tmp_path, tokenizer_path):
    """One flipped bit anywhere: a tokenizer or one line, and no crash."""
    model = bytearray(tokenizer_path.read_bytes())
    refused = 0
    for place in range(0, len(model), 97):
        model[place] ^= 0x80
        (tmp_path / "a.model").write_bytes(model)
        model[place] ^= 0x80
        try:
            Tokenizer(tmp_path / "a.model")
        except DataError as error:
            refused += 1
            assert "a.model: " in str(error)  # noqa: PT017
    assert refused > 10


def test_missing_model(tmp_path):
    with pytest.raises(DataError, match=r"none\.model: no such tokenizer; train one with"):
        Tokenizer(tmp_path / "none.model")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no model", b"\x00" * 100])
def test_foreign_model(tmp_path, content):
    (tmp_path / "a.model").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.model: not a sentencepiece model"):
        Tokenizer(tmp_path / "a.model")


def train_foreign(english, **options) -> bytes:
    model = io.BytesIO()
    sentences = (line for text in english for line in text.splitlines() if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=model, vocab_size=600, minloglevel=2, **options
    )
    return model.getvalue()


def test_a_model_without_an_end_is_refused(tmp_path, english):
    (tmp_path / "a.model").write_bytes(train_foreign(english, eos_id=-1))
    with pytest.raises(DataError, match="has no eos token"):
        Tokenizer(tmp_path / "a.model")


@pytest.mark.parametrize(
    "options",
    [
        {},  # a dummy space at the front, spaces made one
        {
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "split_by_whitespace": False,
            "model_type": "bpe",
        },
        {  # as LLaMA's: a dummy space at the front, which decoding takes off again
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "byte_fallback": True,
            "model_type": "bpe",
        },
    ],
)
def test_models_that_cannot_be_cut_are_not(tmp_path, english, options):
    (tmp_path / "a.model").write_bytes(train_foreign(english, **options))
    tokenizer = Tokenizer(tmp_path / "a.model")
    bare = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a.model"))
    assert not tokenizer.can_cut
    text = "\n".join(english)[:20_000]
    assert tokenizer.encode(text) == bare.encode(text)
