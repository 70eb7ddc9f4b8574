from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_ops
from fused_ops import can_fuse, fusing
from tests.support.device import DEVICE, ON_GPU


def run_python(program: str) -> str:
    """Run without the interpreter, which a process chooses once."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(fused_ops.__file__).parents[1])
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.gpu
def test_on_cuda_by_itself_and_on_a_cpu_only_where_a_test_asks():
    x = torch.empty(2, 8, device=DEVICE)
    assert can_fuse(x) == ON_GPU
    with fusing(True):
        assert can_fuse(x)
        assert can_fuse(x.bfloat16())
        assert can_fuse(x.half())
        assert not can_fuse(x.double())
        assert not can_fuse(x.to("meta"))
        with fusing(False):
            assert not can_fuse(x)
        assert can_fuse(x)
    assert can_fuse(x) == ON_GPU


def test_without_triton_nothing_is_fused_and_the_package_works():
    program = "import sys; sys.modules['triton'] = None; import torch, fused_ops\n"
    program += "print(fused_ops.can_fuse_layer_norm(torch.empty(2, 8)))\n"
    program += "try: fused_ops.fusing(True).__enter__()\nexcept RuntimeError as error: print(error)"
    refused, reason = run_python(program).splitlines()
    assert refused == "False"
    assert reason.startswith("Triton's kernels cannot be imported: ")


@pytest.mark.skipif(ON_GPU, reason="there the kernels run")
def test_without_the_interpreter_a_cpu_has_no_kernels():
    program = "import fused_ops\ntry: fused_ops.fusing(True).__enter__()\nexcept RuntimeError as error: print(error)"
    assert run_python(program).startswith("no GPU is found, and TRITON_INTERPRET=1 was not set")
