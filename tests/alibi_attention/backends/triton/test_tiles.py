from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from alibi_attention import alibi_slopes, attention
from alibi_attention.backends.triton import backward as triton_backward
from alibi_attention.backends.triton import forward as triton_forward
from alibi_attention.backends.triton import tiles as triton_tiles
from alibi_attention.backends.triton.tiles import with_fixed_tile
from tests.support.device import DEVICE

pytestmark = pytest.mark.gpu
BLOCKS = (16, 32, 64)


@triton.jit
def write_block(x_ptr, length, BLOCK: tl.constexpr):
    tl.store(x_ptr, BLOCK)


def make_tuner(pre_hook=None):
    """A tuner whose clock says that each tile it times is faster than those before."""
    times = iter(range(100, 0, -1))

    def run_with_clock(call, quantiles):
        call()
        return [float(next(times))] * len(quantiles)

    configs = [triton.Config({"BLOCK": block}, pre_hook=pre_hook if block == BLOCKS[0] else None) for block in BLOCKS]
    return triton.autotune(configs, key=["length"], do_bench=run_with_clock)(write_block)


def take_block(kernel):
    x = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    kernel[(1,)](x, 1)
    return x.item()


def test_the_fixed_tile_is_the_first_whatever_was_timed_before_and_after():
    tuned = make_tuner()
    assert take_block(tuned) == BLOCKS[-1]
    fixed = with_fixed_tile(tuned)
    assert take_block(fixed) == BLOCKS[0]
    assert take_block(tuned) == BLOCKS[-1]
    assert with_fixed_tile(tuned) is fixed  # it compiles once


def test_the_fixed_tile_is_the_first_that_the_device_has_room_for():
    def refuse(_arguments):
        raise OutOfResources(232448, 166912, "shared memory")

    assert take_block(with_fixed_tile(make_tuner(refuse))) == BLOCKS[1]


@pytest.fixture
def forward_and_backward(make_inputs):
    """Attention at a shape that no other test has, whose launches nobody has made."""
    q, k, v, upstream = (x.to(DEVICE).bfloat16() for x in make_inputs(1, 71, 3, 64))
    qkv = [x.requires_grad_() for x in (q, k, v)]
    slopes = alibi_slopes(3).to(DEVICE)

    def run():
        output = attention(*qkv, alibi_slopes=slopes, backend="triton")
        return output, *torch.autograd.grad(output, qkv, upstream)

    return run


@pytest.fixture
def _restored():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_restored")
def test_deterministic_algorithms_take_the_fixed_tiles_also_after_others_were_chosen(forward_and_backward):
    with_fixed_tile.cache_clear()
    usual = forward_and_backward()
    assert with_fixed_tile.cache_info().currsize == 0
    torch.use_deterministic_algorithms(True)
    fixed = forward_and_backward()
    assert with_fixed_tile.cache_info().currsize == 3
    for x, y in zip(fixed, forward_and_backward(), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(fixed, usual, strict=True):  # tiles of other sizes sum in another order: a rounding step of bf16
        assert (x.double() - y.double()).norm() <= 2.0**-8 * x.double().norm()
    for kernel, tiles in (
        (triton_forward.forward_kernel, triton_tiles.FORWARD),
        (triton_backward.query_gradient_kernel, triton_tiles.QUERY_GRADIENT),
        (triton_backward.key_gradient_kernel, triton_tiles.KEY_GRADIENT),
    ):
        chosen = with_fixed_tile(kernel).best_config.kwargs
        first = tiles.interpreted if triton_tiles.INTERPRETED else tiles.candidates[2, 64][0]
        assert (chosen["BLOCK_M"], chosen["BLOCK_N"]) == first[:2]
