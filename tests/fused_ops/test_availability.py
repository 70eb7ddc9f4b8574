from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fused_ops
from fused_ops import (
    CROSS_ENTROPY,
    LAYER_NORM,
    add_layer_norm,
    can_fuse,
    can_fuse_layer_norm,
    find_gradient,
    fusing,
    fusing_on_meta,
    reduce_rows,
)
from fused_ops.layer_norm import MAX_WIDTH
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


class Launches(TorchDispatchMode):
    """What is launched on the meta device: the kernel, and the shapes that it reads and writes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fused_ops":
            kernel, *tensors = args
            self.seen.append((kernel, *([tuple(x.shape) for x in group] for group in tensors)))
        return function(*args, **(kwargs or {}))


def test_on_the_meta_device_only_the_kernels_that_a_plan_names():
    logits, wide = torch.empty(4, 8, device="meta"), torch.empty(4, MAX_WIDTH + 8, device="meta")
    assert not can_fuse(logits)
    assert not can_fuse_layer_norm(logits)
    with fusing_on_meta(CROSS_ENTROPY, LAYER_NORM):
        assert can_fuse(logits)
        assert can_fuse_layer_norm(logits)
        assert not can_fuse_layer_norm(wide)
        assert not can_fuse(logits.double())
        assert not can_fuse(torch.empty(4, 8))  # a CPU has none by itself
        with fusing_on_meta(CROSS_ENTROPY):
            assert can_fuse(logits)
            assert not can_fuse_layer_norm(logits)
        with fusing(False):
            assert not can_fuse(logits)
        assert can_fuse_layer_norm(logits)
    assert not can_fuse(logits)


@pytest.mark.parametrize("overwrite", [False, True])
def test_on_the_meta_device_cross_entropy_has_its_shapes_and_notes_its_launches(overwrite):
    logits, labels = torch.empty(4, 8, device="meta").bfloat16(), torch.empty(4, dtype=torch.int64, device="meta")
    columns = {"num_columns": 7, "first_column": 0}
    with Launches() as launches:
        found = reduce_rows(logits, labels, **columns)
        gradient = find_gradient(logits, labels, *found[:2], found[0], overwrite=overwrite, **columns)
    assert [(x.shape, x.dtype) for x in found] == [((4,), torch.float32)] * 3
    assert (gradient.shape, gradient.dtype) == (logits.shape, torch.bfloat16)
    assert (gradient.untyped_storage()._cdata == logits.untyped_storage()._cdata) == overwrite
    assert launches.seen == [
        (CROSS_ENTROPY, [(4, 8), (4,)], [(4,)] * 3),
        (CROSS_ENTROPY, [(4, 8), (4,), (4,), (4,), (4,)], [(4, 8)]),
    ]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_sum", [False, True])
def test_on_the_meta_device_layer_norm_has_its_shapes_and_notes_its_launches(with_sum, with_bias):
    x, y = torch.empty(2, 2, 3, 8, device="meta").bfloat16().requires_grad_().unbind()
    weight, bias = torch.empty(2, 8, device="meta").bfloat16().requires_grad_().unbind()
    leaves = [x, weight] + [y] * with_sum + [bias] * with_bias
    with Launches() as launches:
        total, norm = add_layer_norm(x, y if with_sum else None, weight, bias if with_bias else None, 1e-5)
        gradients = torch.autograd.grad((total, norm), leaves, (total, norm))
    assert [(a.shape, a.dtype) for a in gradients] == [(a.shape, a.dtype) for a in leaves]
    rows, row, statistics = (2, 3, 8), (8,), [(6,)] * 2
    forward, backward = launches.seen
    assert forward[1:] == ([rows] * (1 + with_sum) + [row] * (1 + with_bias), [rows] * (1 + with_sum) + statistics)
    assert backward[1:] == ([rows] * 3 + [row] + statistics, [rows] + [row] * (1 + with_bias))
    assert forward[0] == backward[0] == LAYER_NORM
