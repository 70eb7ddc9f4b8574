from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megalibi.data.tokenizer.training import train_tokenizer
from megalibi.runtime.exit import run_tool
from tests.support.in_process import load_tool
from tests.support.warm_python import warm_python

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "benchmark_data.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([warm_python(), str(TOOL), *map(str, arguments)], capture_output=True, text=True)


def check_provenance(record: dict) -> None:
    assert record["command"].startswith("python ")
    assert {"commit", "date", "hardware", "versions"} <= set(record)


def test_preprocess(tmp_path):
    texts = [path.read_text() for path in sorted((ROOT / "megalibi").rglob("*.py"))]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, 500, tmp_path / "t.model")
    output = tmp_path / "new" / "out.json"
    arguments = [
        "--input",
        tmp_path / "corpus.jsonl",
        "--tokenizer",
        tmp_path / "t.model",
        "--repeats",
        2,
        "--workers",
        1,
    ]
    done = run("preprocess", *arguments, "--output", output)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    check_provenance(record)
    assert record["documents"] == sum(bool(text) for text in texts)
    ours, bare, ratio = (
        record[name]["repeats"] for name in ("preprocess_tokens_per_second", "bare_tokens_per_second", "ratio_to_bare")
    )
    assert ratio == [a / b for a, b in zip(ours, bare, strict=True)]
    assert len(ratio) == 2
    assert record["ratio_to_bare"]["median"] == sum(ratio) / 2
    assert min(ours + bare) > 0


def test_loader():
    arguments = ["--gigabytes", 0.02, "--repeats", 1, "--seconds", 0.2, "--seq-lengths", 64, 128]
    done = run("loader", *arguments)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    check_provenance(record)
    for seq_length in (64, 128):
        assert record[f"seq_length_{seq_length}_tokens_per_second"]["median"] > 0
        assert record[f"seq_length_{seq_length}_document_mask_tokens_per_second"]["median"] > 0


def test_a_mistake_is_one_line(monkeypatch, capsys):
    tool = load_tool(TOOL)
    preprocess = ["preprocess", "--input", "none.txt", "--tokenizer", "none.model"]
    handler = signal.getsignal(signal.SIGTERM)
    for arguments, message in (
        (["loader", "--repeats", 0], "--repeats=0: must be at least 1"),
        (["loader", "--gigabytes", "nan"], "--gigabytes=nan: must be at least 0.001"),
        (["loader", "--gigabytes", -1], "--gigabytes=-1.0: must be at least 0.001"),
        (["loader", "--gigabytes", "inf"], "--gigabytes=inf: must be at least 0.001 and fit into 64 bits"),
        (["loader", "--seconds", 0], "--seconds=0.0: must be at least 0.001"),
        (["loader", "--seq-lengths", 64, 0], "--seq-lengths=0: must be at least 1"),
        (
            ["loader", "--gigabytes", 0.001, "--seq-lengths", 10**6],
            "--seq-lengths=1000000: must be below the 500000 tokens of a file of --gigabytes=0.001",
        ),
        (["loader", "--folder", TOOL], f"--folder={TOOL} cannot be written: {TOOL} is no folder"),
        (["loader", "--output", ROOT], f"--output={ROOT}: must be the name of a file, and is a folder"),
        ([*preprocess, "--workers", 0], "--workers=0: must be at least 1"),
        ([*preprocess, "--output", TOOL / "a"], f"--output={TOOL / 'a'} cannot be written: {TOOL} is no folder"),
    ):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_tool(tool.main)
        output, errors = capsys.readouterr()
        assert (ended.value.code, output) == (2, "")
        assert errors.startswith(f"error: {message}")
        assert errors.count("\n") == 1
    signal.signal(signal.SIGTERM, handler)  # the tool's own, so far
