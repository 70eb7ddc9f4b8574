"""WikiText-103 has as many tokens as its users count; the text itself is looked for, and not part of this project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megalibi.config import load_config
from megalibi.data.preprocess import preprocess
from megalibi.data.text.documents import DocumentReader
from megalibi.data.tokenizer.words import WordTokenizer, count_words
from megalibi.data.tokens.token_file import TokenFile

ROOT = Path(__file__).parents[3]
FOLDER = Path(os.environ.get("TEST_WIKITEXT", ROOT / "data" / "wikitext-103"))
"""Where the files of the archive wikitext-103-v1 are, as they came: wiki.train.tokens, wiki.valid.tokens and so on."""
TOKENS = {"train": 103_227_021, "valid": 217_646, "test": 245_569}
"""Words and line ends, as fairseq counts them; the paper itself says "about 103 million" (section 2.1)."""


def find_text(split: str) -> Path:
    path = FOLDER / f"wiki.{split}.tokens"
    if not path.is_file():
        pytest.skip(f"{path} is not there: put WikiText-103 there, or name its folder in TEST_WIKITEXT")
    return path


def count_text(path: Path, folder: Path) -> WordTokenizer:
    count_words(DocumentReader([str(path)], keep_empty=True), folder / "wiki.words")
    return WordTokenizer(folder / "wiki.words")


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_split_has_its_tokens_all_of_them_in_its_vocabulary(split: str, tmp_path: Path) -> None:
    path = find_text(split)
    words = count_text(path, tmp_path)
    counts = [int(line.rpartition(" ")[2]) for line in Path(words.path).read_text().splitlines()]
    assert sum(counts) == TOKENS[split]
    preprocess([str(path)], tokenizer_path=words.path, output=str(tmp_path / split))
    tokens = TokenFile(str(tmp_path / split))
    assert tokens.num_tokens == TOKENS[split]
    ids = tokens.read(0, tokens.num_tokens)
    assert [(ids == token).sum() for token in (2, 3)] == counts[2:4]  # line ends, and <unk> as it stands in the text
    assert counts[2] == path.read_bytes().count(b"\n")


def test_the_training_text_makes_the_vocabulary_of_the_papers_model(tmp_path: Path) -> None:
    words = count_text(find_text("train"), tmp_path)
    counts = [int(line.rpartition(" ")[2]) for line in Path(words.path).read_text().splitlines()]
    assert sum(counts) == TOKENS["train"]
    assert words.vocab_size == load_config(ROOT / "configs" / "wikitext103_alibi_512.yaml").model.vocab_size == 267_744
