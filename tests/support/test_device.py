"""The suite computes where TEST_DEVICE says, and what is for a GPU asks little of the GPU's machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from fused_ops.availability import INTERPRETED
from tests.support.device import COLLECTIVES, DEVICE, ON_GPU
from tests.support.ranks import run_on_ranks

ROOT = Path(__file__).parents[2]
MAY_BE_MISSING = ("hypothesis", "_hypothesis_pytestplugin", "lm_eval", "pytest_timeout", "importlinter")
WITHOUT_PACKAGES = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MAY_BE_MISSING}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Missing())
"""
FOR_A_GPU = (
    "tests/alibi_attention/backends/triton/test_attend.py",
    "tests/alibi_attention/bench/test_contract.py",
    "tests/alibi_attention/every_backend/test_bias.py",
    "tests/alibi_attention/every_backend/test_dropout.py",
    "tests/alibi_attention/every_backend/test_exact.py",
    "tests/alibi_attention/every_backend/test_horizon.py",
    "tests/alibi_attention/every_backend/test_horizon_margins.py",
    "tests/alibi_attention/every_backend/test_placement.py",
    "tests/alibi_attention/test_packed.py",
    "tests/engine/test_backends.py",
    "tests/engine/test_bf16_gradients.py",
    "tests/engine/test_build.py",
    "tests/engine/test_fused.py",
    "tests/engine/test_step.py",
    "tests/model/test_fused.py",
    "tests/plan/test_memory.py",
    "tests/train/test_loop.py",
)


def _describe_rank() -> tuple[str, str, bool, bool]:
    device, collectives = get_accelerator().device_name(), torch.distributed.get_backend()
    return device, collectives, torch.cuda.is_available(), INTERPRETED


@pytest.mark.gpu
def test_tests_and_their_ranks_compute_where_they_are_told_to() -> None:
    assert torch.cuda.is_available() == ON_GPU
    assert get_accelerator().device_name() == DEVICE
    assert (not ON_GPU) == INTERPRETED, "on a GPU Triton compiles: unset TRITON_INTERPRET"
    assert run_on_ranks(1, _describe_rank) == [(DEVICE, COLLECTIVES, ON_GPU, not ON_GPU)]


def test_what_is_for_a_gpu_is_collected_without_the_packages_of_a_developer(tmp_path: Path) -> None:
    (tmp_path / "without_packages.py").write_text(WITHOUT_PACKAGES)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "PYTEST_ADDOPTS")
    }
    environment |= {"TEST_DEVICE": "cuda", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-p", "without_packages", "-p", "no:cacheprovider", "-m", "gpu"]
    done = subprocess.run([*command, "--collect-only"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(FOR_A_GPU) <= {line.partition("::")[0] for line in done.stdout.splitlines()}
