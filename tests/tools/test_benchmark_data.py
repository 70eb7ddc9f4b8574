from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megalibi.data.tokenizer_training import train_tokenizer

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "benchmark_data.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True)


def check_provenance(record: dict) -> None:
    assert record["command"].startswith("python ")
    assert {"commit", "date", "hardware", "versions"} <= set(record)


def test_preprocess(tmp_path):
    texts = [path.read_text() for path in sorted((ROOT / "megalibi").rglob("*.py"))]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, 500, tmp_path / "t.model")
    output = tmp_path / "new" / "out.json"
    arguments = ["--input", tmp_path / "corpus.jsonl", "--tokenizer", tmp_path / "t.model", "--repeats", 2]
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


def test_a_mistake_is_one_line():
    done = run("loader", "--repeats", 0)
    assert done.returncode == 2
    assert done.stderr == "error: --repeats 0: at least 1 is needed\n"
