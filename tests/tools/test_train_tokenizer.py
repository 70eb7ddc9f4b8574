from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megalibi.data.tokenizer import Tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def corpus(tmp_path):
    """This repository's sources: two files, of which the second holds a character that the first does not."""
    sources = sorted((Path(__file__).parents[2] / "megalibi").rglob("*.py"))
    (tmp_path / "a.txt").write_text("\n".join(path.read_text() for path in sources))
    (tmp_path / "b.txt").write_text("ß" * 100)
    return tmp_path


def test_two_processes_train_the_same_bytes(corpus):
    models = []
    for name in ("one.model", "two.model"):
        arguments = ["--input", corpus / "a.txt", corpus / "b.txt", "--vocab-size", 500, "--max-sentences", 40]
        done = run(*arguments, "--output", corpus / name)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{corpus / name}: 500 ids, sha256 ")
        models.append((corpus / name).read_bytes())
    assert models[0] == models[1]


def test_inputs_may_repeat(corpus):
    output = corpus / "t.model"
    done = run("--input", corpus / "a.txt", "--input", corpus / "b.txt", "--vocab-size", 500, "--output", output)
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer(output)
    assert tokenizer.vocab_size == 500
    assert len(tokenizer.encode("ß")) == 1  # learned from the second file
    assert tokenizer.decode(tokenizer.encode("x  = 'ß'\n")) == "x  = 'ß'\n"


def test_a_mistake_is_one_line(tmp_path):
    done = run("--input", tmp_path / "none.txt", "--vocab-size", 500, "--output", tmp_path / "t.model")
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'none.txt'}: no such file\n"
    assert list(tmp_path.iterdir()) == []


def test_a_word_level_vocabulary_is_made_and_encoded_by_its_suffix(tmp_path):
    (tmp_path / "wiki.tokens").write_text(" \n = Title = \n \n the cat and the <unk> \n")
    output = tmp_path / "wiki.words"
    done = run("--input", tmp_path / "wiki.tokens", "--output", output)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{output}: 16 ids, sha256 ")  # 9 of them, up to a multiple of 8
    assert output.read_text().startswith("<s> 0\n<pad> 0\n</s> 4\n<unk> 1\n= 2\nthe 2\nTitle 1\n")
    preprocess = [TOOL.with_name("preprocess_data.py"), "--input", tmp_path / "wiki.tokens", "--tokenizer", output]
    done = subprocess.run(
        [sys.executable, *map(str, preprocess), "--output", tmp_path / "wiki", "--workers", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "1 documents, 12 tokens in " in done.stdout  # 8 words and 4 line ends


def test_a_sentencepiece_model_needs_a_size(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    done = run("--input", tmp_path / "a.txt", "--output", tmp_path / "t.model")
    assert done.returncode == 2
    assert done.stderr == "error: --vocab-size is missing: a number of token ids, 32000 for example\n"
