"""Two runs of preprocess_data.py on one --output, and a run after one that was killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megalibi.data.text.documents import Piece
from megalibi.data.tokenizer.words import WordTokenizer, count_words
from megalibi.data.tokens.token_file import TokenFile

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "preprocess_data.py"
TIMEOUT_SECONDS = 300
LINES = 200_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A long text of the word 'long', a short one of 'short', and an old token file."""
    (tmp_path / "long.txt").write_text("long long long long long long long\n" * LINES)
    (tmp_path / "short.txt").write_text("short\n")
    count_words([Piece("long short", True)], tmp_path / "t.words")
    assert start(tmp_path, "short.txt").wait(TIMEOUT_SECONDS) == 0
    return tmp_path


def start(folder: Path, text: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(TOOL), "--input", text, "--tokenizer", "t.words", "--output", "out", "--overwrite"]
    return subprocess.Popen(
        [*command, "--workers", "1"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until_writing(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not ((folder / "out.bin.tmp").exists() and (folder / "out.bin.tmp").stat().st_size > 0):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_is(folder: Path, word: str, count: int) -> None:
    token = WordTokenizer(folder / "t.words").encode(word)[0]
    tokens = TokenFile(folder / "out")
    assert np.count_nonzero(tokens.read(0, tokens.num_tokens) == token) == count
    assert sorted(path.name for path in folder.glob("out*")) == ["out.bin", "out.idx", "out.json"]


def test_a_second_run_is_refused_and_the_first_one_is_whole(folder: Path) -> None:
    first = start(folder, "long.txt")
    wait_until_writing(folder, first)
    first.send_signal(signal.SIGSTOP)  # so that it is still writing when the second begins
    second = start(folder, "short.txt")
    _, errors = second.communicate(timeout=TIMEOUT_SECONDS)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert errors == "error: out: cannot be written: another process is writing out.bin\n"
    _, errors = first.communicate(timeout=TIMEOUT_SECONDS)
    assert first.returncode == 0, errors
    assert_is(folder, "long", 7 * LINES)


def test_what_a_killed_run_left_is_taken_over(folder: Path) -> None:
    killed = start(folder, "long.txt")
    wait_until_writing(folder, killed)
    killed.kill()
    killed.wait(TIMEOUT_SECONDS)
    assert (folder / "out.bin.tmp").stat().st_size > 0
    following = start(folder, "short.txt")
    _, errors = following.communicate(timeout=TIMEOUT_SECONDS)
    assert following.returncode == 0, errors
    assert_is(folder, "short", 1)
