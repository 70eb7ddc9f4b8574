from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalibi.data.tokenizer.tokenizer import Tokenizer

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
    assert done.stderr == "error: --vocab-size is missing: give the number of token ids, for example 32000\n"


def test_an_existing_tokenizer_is_kept_unless_told(corpus):
    output = corpus / "t.model"
    output.write_text("precious")
    arguments = ["--input", corpus / "a.txt", "--vocab-size", 500, "--output", output]
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: --output={output}: must not exist yet; choose another name, or replace it with --overwrite\n"
    )
    assert output.read_text() == "precious"
    assert run(*arguments, "--overwrite").returncode == 0
    assert Tokenizer(output).vocab_size == 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", "0"], "--vocab-size=0: must be above 258, "),
        (["--vocab-size", "500", "--character-coverage", "2"], "--character-coverage=2.0: must be a share from"),
        (["--vocab-size", "500", "--character-coverage", "nan"], "--character-coverage=nan: must be a share from"),
        (["--vocab-size", "500", "--max-sentences", "0"], "--max-sentences=0: must be at least 1"),
        (["--vocab-size", str(2**40)], f"--vocab-size={2**40}: must be above 258"),
        (["--vocab-size", "500", "--output", "."], "--output=.: must be the name of a file, and is a folder"),
        (["--vocab-size", "500", "--output", "a.txt/t.model"], "--output=a.txt/t.model cannot be written: a.txt is"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line(corpus, monkeypatch, arguments, message):
    monkeypatch.chdir(corpus)
    before = sorted(corpus.iterdir())
    done = run("--input", "a.txt", "--output", "t.model", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert sorted(corpus.iterdir()) == before


def test_an_input_is_not_written_over(corpus):
    content = (corpus / "a.txt").read_bytes()
    done = run("--input", corpus / "a.txt", "--vocab-size", 500, "--output", corpus / "a.txt", "--overwrite")
    assert (done.returncode, done.stderr) == (
        2,
        f"error: --output={corpus / 'a.txt'}: must not be one of the inputs, which would be lost\n",
    )
    assert (corpus / "a.txt").read_bytes() == content


def test_a_full_disk_does_not_lose_the_training(corpus):
    """A real one: a small tmpfs in a mount namespace of its own."""
    (corpus / "full").mkdir()
    (corpus / "temporary").mkdir()
    script = f'mount -t tmpfs -o size=16k tmpfs "{corpus}/full" && exec "$@"'
    arguments = ["--input", corpus / "a.txt", "--vocab-size", 2000, "--output", corpus / "full" / "t.model"]
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script, "bash"]
    done = subprocess.run(
        [*namespace, sys.executable, TOOL, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(corpus / "temporary")},
    )
    assert done.returncode == 2, done.stderr
    what, _, kept = done.stderr.rstrip("\n").rpartition("; what was made is kept as ")
    assert what == f"error: {corpus / 'full' / 't.model'} cannot be written: No space left on device"
    assert Path(kept).parent == corpus / "temporary"
    assert Tokenizer(kept).vocab_size == 2000


def test_bad_records_and_what_was_left_out_are_said(tmp_path):
    lines = [json.dumps({"text": f"some text, number {number} of many"}) for number in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": 7}', '{"text": ""}']) + "\n")
    arguments = ["--input", tmp_path / "a.jsonl", "--vocab-size", 290, "--output", tmp_path / "t.model"]
    done = run(*arguments)
    assert done.returncode == 2
    assert f"{tmp_path / 'a.jsonl'}, line 401: text is a number, not text" in done.stderr
    done = run(*arguments, "--skip-bad-records", "--max-sentences", "100")
    assert done.returncode == 0, done.stderr
    assert "line 401: text is a number, not text; left out" in done.stderr
    assert done.stdout.splitlines()[1:] == [
        "learned from 100 of 400 sentences, drawn at random (--max-sentences)",
        "left out: 1 without text, 1 bad records",
    ]
