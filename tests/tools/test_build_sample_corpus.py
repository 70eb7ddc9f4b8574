from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.in_process import load_tool

TOOL = Path(__file__).parents[2] / "tools" / "build_sample_corpus.py"


def run(output: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "new" / "folder"
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert "train.jsonl" in done.stdout
    return folder


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_there_is_enough_text_and_some_of_it_for_validation(built):
    train, valid = read_texts(built / "train.jsonl"), read_texts(built / "valid.jsonl")
    train_bytes, valid_bytes = (sum(len(text.encode()) for text in texts) for texts in (train, valid))
    assert train_bytes + valid_bytes >= 10_000_000
    assert 0.005 < valid_bytes / train_bytes < 0.1
    assert not set(train) & set(valid)
    assert all(text.strip() for text in train + valid)


def test_all_three_kinds_are_there(built):
    train = read_texts(built / "train.jsonl")
    starts = ('The "assert" statement', "json\n\n", "zlib\n\n", 'r"""HTTP/1.1 client library')
    for start in starts:
        assert any(text.startswith(start) for text in train), start


def test_the_same_python_builds_the_same_files(built, tmp_path):
    assert run(tmp_path, PYTHONHASHSEED="77").returncode == 0
    for name in ("train.jsonl", "valid.jsonl"):
        assert (tmp_path / name).read_bytes() == (built / name).read_bytes()


def test_a_module_is_on_one_side_as_a_whole():
    tool = load_tool(TOOL)
    names = [f"module{i}" for i in range(10_000)]
    chosen = sum(map(tool.is_validation, names))
    assert 200 < chosen < 400
    documents = list(tool.iterate_documents())
    by_name = [name for name, text in documents if name == "json.decoder" and text.strip()]
    assert len(by_name) == 2  # its docstrings and its source, both under the name that decides


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(tmp_path / "file")
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'file'}: cannot be written: File exists\n"
