from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from megalibi.cli.preprocess import Display, Written
from megalibi.console import Progress
from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.training import train_tokenizer
from megalibi.data.tokens.token_file import TokenFile
from tests.support.terminal import read_terminal

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "preprocess_data.py"


@pytest.fixture(scope="module")
def sources() -> list[str]:
    return [path.read_text() for path in sorted((ROOT / "megalibi").rglob("*.py"))]


@pytest.fixture(scope="module")
def model(tmp_path_factory, sources) -> Path:
    path = tmp_path_factory.mktemp("model") / "t.model"
    train_tokenizer(sources, 500, path)
    return path


@pytest.fixture
def corpus(tmp_path, sources) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in sources))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(TOOL), *map(str, arguments)]


def test_files_are_the_same_for_one_and_three_workers(tmp_path, corpus, model, sources):
    (tmp_path / "more.txt").write_text("one more\n")
    for workers in (1, 3):
        arguments = ["--input", corpus, "--input", tmp_path / "more.txt", "--tokenizer", model, "--text-key", "body"]
        output = tmp_path / f"out{workers}"
        done = subprocess.run(
            command(*arguments, "--workers", workers, "--output", output), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out1{suffix}").read_bytes() == (tmp_path / f"out3{suffix}").read_bytes()
    token_file = TokenFile(tmp_path / "out1")
    tokenizer = Tokenizer(model)
    texts = [text for text in sources if text]
    assert token_file.num_documents == len(texts) + 1
    expected = [token for text in [*texts, "one more\n"] for token in [*tokenizer.encode(text), 1]]
    assert token_file.read(0, token_file.num_tokens).tolist() == expected
    assert f"{len(texts) + 1} documents, {len(expected):,} tokens in " in done.stdout
    assert "tokens/s" in done.stdout


def test_existing_output_is_refused_in_one_line(tmp_path, corpus, model):
    (tmp_path / "out.bin").write_text("precious")
    arguments = ["--input", corpus, "--tokenizer", model, "--output", tmp_path / "out", "--text-key", "body"]
    done = subprocess.run(command(*arguments), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'out'}.bin exists; choose another --output")
    assert done.stderr.count("\n") == 1
    assert subprocess.run(command(*arguments, "--overwrite", "--workers", 1), capture_output=True).returncode == 0
    assert TokenFile(tmp_path / "out").num_tokens > 0


@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_leaves_nothing_half_written(tmp_path, corpus, model, interrupt):
    """The input is long, so that the interrupt comes in the middle of the work."""
    long_corpus = tmp_path / "long.jsonl"
    long_corpus.write_text(corpus.read_text() * 400)
    folder = tmp_path / "out"
    arguments = [
        "--input",
        long_corpus,
        "--tokenizer",
        model,
        "--output",
        folder / "a",
        "--text-key",
        "body",
        "--workers",
        1,
    ]
    # A test run under nohup ignores the end of the terminal, and its children would.
    heeding = ["bash", "-c", 'exec env --default-signal=HUP "$@"', "bash", *command(*arguments)]
    with subprocess.Popen(heeding, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 300
        while not ((folder / "a.bin.tmp").exists() and (folder / "a.bin.tmp").stat().st_size > 0):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # Ctrl-C and the end of a terminal reach the workers, too.
        os.killpg(process.pid, interrupt) if interrupt != signal.SIGTERM else process.send_signal(interrupt)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    *progress, last = errors.splitlines()
    assert last == "error: interrupted"
    assert all("tokens/s" in line for line in progress)
    assert list(folder.iterdir()) == []


def test_progress_on_a_terminal(tmp_path, corpus, model):
    """On a terminal there is a bar with tokens per second and the time left."""
    terminal, end = pty.openpty()
    arguments = ["--input", corpus, "--tokenizer", model, "--output", tmp_path / "a", "--text-key", "body"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen(
        command(*arguments, "--workers", 1), stderr=end, stdout=subprocess.DEVNULL, env=environment
    )
    os.close(end)
    text = read_terminal(terminal)
    assert process.wait() == 0
    assert "tokens/s" in text
    assert "s left" in text


def test_progress_lines_elsewhere():
    output = io.StringIO()
    written = Written(documents=3, tokens=12345, text_bytes=250)
    with Progress(Console(file=output), line_every_seconds=0.0) as progress:
        Display(1000, progress).update(written)
    assert "3 documents, 12,345 tokens, " in output.getvalue()
    assert " tokens/s, 25%, about 0 s left" in output.getvalue()
    with Progress(Console(file=output), line_every_seconds=0.0) as progress:
        Display(None, progress).update(written)
    assert output.getvalue().strip().endswith("time left unknown")


def test_nohup_goes_on_past_the_end_of_the_terminal(tmp_path, corpus, model):
    arguments = ["--input", corpus, "--tokenizer", model, "--output", tmp_path / "a", "--text-key", "body"]
    ignoring = ["bash", "-c", "trap '' HUP; exec \"$@\"", "bash"]
    process = subprocess.Popen([*ignoring, *command(*arguments, "--workers", 1)], start_new_session=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "a.bin.tmp").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(300) == 0
    assert TokenFile(tmp_path / "a").num_tokens > 0


def test_bad_records_are_an_error_or_listed(tmp_path, model):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": 7}\n\n{"text": null}\n{"text": "two"}\nno json\n')
    arguments = ["--input", tmp_path / "a.jsonl", "--tokenizer", model, "--output", tmp_path / "out", "--workers", 1]
    done = subprocess.run(command(*arguments), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path / 'a.jsonl'}, line 2: text is a number, not text; "
        "correct it, or leave such records out with --skip-bad-records\n"
    )
    assert not list(tmp_path.glob("out*"))
    done = subprocess.run(command(*arguments, "--skip-bad-records"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'out'}: 2 documents, ")
    assert "line 2: text is a number, not text; left out\n" in done.stderr
    assert "line 6: it is not JSON: Expecting value (column 1); left out\n" in done.stderr
    assert "left out: 1 without text, 2 bad records\n" in done.stderr
    (source,) = json.loads((tmp_path / "out.json").read_text())["sources"]
    assert source["num_bad_records"] == 2
    assert [line.partition(":")[0] for line in source["bad_records"]] == ["line 2", "line 6"]


def test_a_tokenizer_that_cannot_represent_the_text_is_said(tmp_path, sources):
    """As a word-level vocabulary of other text: here 8 of 20 characters stand in words that it does not know."""
    (tmp_path / "known.txt").write_text("some words\n")
    (tmp_path / "a.txt").write_text("some new text words\n" * 30)
    trainer = [
        TOOL.with_name("train_tokenizer.py"),
        "--input",
        tmp_path / "known.txt",
        "--output",
        tmp_path / "t.words",
    ]
    subprocess.run([sys.executable, *map(str, trainer)], check=True, capture_output=True)
    arguments = ["--input", tmp_path / "a.txt", "--tokenizer", tmp_path / "t.words", "--output", tmp_path / "out"]
    done = subprocess.run(command(*arguments, "--workers", 1), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "t.words cannot represent 35% of the characters, 210 of 600: they are lost" in done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["lost_characters"] == 210
