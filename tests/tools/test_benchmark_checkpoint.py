from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "benchmark_checkpoint.py"
SMALL = ["--hidden-size", "32", "--num-layers", "2", "--seq-length", "8", "--repeats", "1", "--steps", "3"]


def test_it_measures_a_real_rank_and_leaves_nothing(tmp_path: Path) -> None:
    output, disk = tmp_path / "new" / "out.json", tmp_path / "disk"
    arguments = ["bandwidth", "stall", "--folder", str(disk), "--output", str(output), *SMALL]
    done = subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert {"command", "commit", "date", "hardware", "versions"} <= set(record)
    assert record["ranks"] == 1
    # Weights and two states in fp32: of 2 x 12 x 32^2 parameters in matrices, the embedding, and vectors.
    assert record["checkpoint_bytes"]["median"] == pytest.approx(12 * (24 * 32**2 + 4096 * 32), rel=0.1)
    for name in ("save", "plain_write", "load", "plain_read"):
        assert record[f"{name}_bytes_per_second"]["median"] > 0
    for name in ("copy", "steps"):  # no more: what is faster is up to the machine
        assert record[f"{name}_seconds"]["median"] > 0
    assert list(disk.iterdir()) == []
