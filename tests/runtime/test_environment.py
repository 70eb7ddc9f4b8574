from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megalibi.config import save_config
from megalibi.errors import ConfigError
from tests.support.runs import make_config

SCRIPT = Path(__file__).parents[2] / "megalibi" / "runtime" / "environment.py"
AMPERE, HOPPER, BLACKWELL = 8, 9, 10
NO_COMPILER = {"TORCHDYNAMO_DISABLE": "1"}
SEGMENTS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **NO_COMPILER}
ONE_QUEUE = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def choose(environment: dict[str, str], compute_capability: int | None = HOPPER, **sections: Any) -> dict[str, str]:
    chosen: dict[str, str] = runpy.run_path(str(SCRIPT))["choose_settings"](
        make_config("none", **sections), environment, compute_capability
    )
    return chosen


def test_segments_grow_unless_the_user_has_set_up_the_allocator() -> None:
    assert choose({}) == SEGMENTS
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert choose({name: "max_split_size_mb:512"}) == NO_COMPILER


def test_no_compiler_is_imported_unless_the_user_wants_dynamo() -> None:
    assert choose({"TORCHDYNAMO_DISABLE": "0"}) == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def test_tensor_parallel_orders_kernels_where_that_helps() -> None:
    tensor_parallel = {"parallel": {"tensor_parallel_size": 2}}
    for stage, compute_capability, expected in (
        (1, AMPERE, ONE_QUEUE),
        (2, HOPPER, ONE_QUEUE),
        (1, None, ONE_QUEUE),
        (1, BLACKWELL, {}),
        (3, HOPPER, {}),  # its gathering of weights would be held up
    ):
        assert choose({}, compute_capability, **tensor_parallel, zero={"stage": stage}) == SEGMENTS | expected
    assert choose({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, **tensor_parallel) == SEGMENTS


def test_a_deterministic_run_sets_up_cublas_and_nccl() -> None:
    deterministic = {"train": {"deterministic": True}}
    nccl = {"NCCL_NVLS_ENABLE": "0"}
    assert choose({}, **deterministic) == SEGMENTS | nccl | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    assert choose({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, **deterministic) == SEGMENTS | nccl
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG=:0:0 .*: must be unset or :4096:8 or :16:8 with"):
        choose({"CUBLAS_WORKSPACE_CONFIG": ":0:0"}, **deterministic)


@pytest.mark.parametrize(
    ("script", "expected"),
    [("echo 9.0; echo 8.6", AMPERE), ("echo 10.0", BLACKWELL), ("exit 9", None), ("echo '[N/A]'", None), ("", None)],
)
def test_the_oldest_gpu_that_nvidia_smi_names_counts(
    script: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    find_compute_capability = runpy.run_path(str(SCRIPT))["find_compute_capability"]
    assert find_compute_capability() == expected
    command.unlink()
    assert find_compute_capability() is None


@pytest.mark.parametrize("command", ["study measure-turn", "pretrain", "study profile-step"])
def test_every_command_that_trains_heeds_it(command: str, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    save_config(make_config("none", train={"deterministic": True}), run)
    arguments = ["--config", str(run), *([] if command == "pretrain" else ["--output", str(tmp_path / "out.json")])]
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":0:0"}
    done = subprocess.run(
        [sys.executable, "-m", "megalibi", *command.split(), *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: CUBLAS_WORKSPACE_CONFIG=:0:0 in the environment: must be unset or ")


def test_it_is_chosen_before_torch_is_imported() -> None:
    program = "import megalibi.runtime.environment, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
