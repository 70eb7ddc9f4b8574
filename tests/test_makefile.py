from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_make(command: list[str], makefile: str = "") -> str:
    # Without what a make above this one says to makes below it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input=makefile, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize(("gpus", "ranks"), [("0", 2), ("1", 1), ("2", 2), ("8", 2)])
def test_the_quickstart_has_no_more_ranks_than_gpus_and_the_tensor_parallel_size_of_its_ranks(
    gpus: str, ranks: int
) -> None:
    command = ["make", "--dry-run", "--always-make", "quickstart", f"GPUS={gpus}"]
    recipes = run_make(command).replace("\\\n", "")
    (launch,) = [line for line in recipes.splitlines() if "launch/pretrain.py" in line]
    assert launch.startswith(f"ranks={ranks}; echo ")
    assert "--num_accelerators $ranks " in launch
    assert launch.endswith("parallel.tensor_parallel_size=$ranks")


def test_gpus_are_counted_and_the_cpu_may_be_asked_for() -> None:
    for environment in ("DS_ACCELERATOR=cpu", "CUDA_VISIBLE_DEVICES="):
        program = f"include Makefile\nshow: ; @echo 'GPUs {'$(GPUS)'}'\n"
        command = ["env", environment, "make", "-s", "-f", "-", "show"]
        assert run_make(command, program) == "GPUs 0\n"
