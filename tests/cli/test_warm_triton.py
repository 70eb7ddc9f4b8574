"""Kernels compiled for a GPU that is not here, into a cache that a process with the GPU would read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
TOOL = Path(__file__).parents[2] / "tools" / "warm_triton.py"


NEEDED = "must be a type and a head dimension of a kernel"


def warm(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment["TRITON_INTERPRET"] = "1"  # of whoever has set it: nothing would be compiled
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_call_compiles_all_of_its_kernels(tmp_path: Path) -> None:
    done = warm(tmp_path, "--capability", "90", "--dtype", "bfloat16", "--head-dim", "32", "--workers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("1 of 1 calls compiled in ")
    compiled = {path.stem for path in tmp_path.rglob("*.cubin")}
    assert compiled == {"key_norms_kernel", "forward_kernel", "query_gradient_kernel", "key_gradient_kernel"}
    tiles = list(tmp_path.rglob("forward_kernel.json"))
    assert len(tiles) > 1  # every tile that the tuner will time
    assert {json.loads(path.read_text())["target"]["arch"] for path in tiles} == {90}


def test_what_nothing_would_be_compiled_for_is_refused(tmp_path: Path) -> None:
    done = warm(tmp_path, "--capability", "90", "--dtype", "float64")
    assert (done.returncode, done.stderr) == (2, f"error: --dtype=float64 with --head-dim=None: {NEEDED}\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_asks_for_one(tmp_path: Path) -> None:
    done = warm(tmp_path)
    assert (done.returncode, done.stderr) == (
        2, "error: torch sees no GPU: give --capability, 90 for an H100, 80 for an A100\n"
    )  # fmt: skip
