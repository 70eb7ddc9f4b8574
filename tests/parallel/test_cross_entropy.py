from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops import fusing
from megalibi.parallel.cross_entropy import IGNORED_LABEL, vocab_parallel_cross_entropy
from megalibi.parallel.groups import ALONE
from tests.support.ranks import run_on_ranks
from tests.support.tensors import FP32_RELATIVE_ERROR, assert_close, randn, tensor_group

BOUNDS = {torch.float32: FP32_RELATIVE_ERROR, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Relative errors of a gradient: in 16 bits that of rounding once."""
WORLD_SIZES = [2, 4]
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["pytorch", "fused"])
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # of the interpreter, for garbage in padding


def _labels(vocab_size: int, batch: int = 3, seq_length: int = 7) -> Tensor:
    labels_BS = torch.randint(vocab_size, (batch, seq_length), generator=torch.Generator().manual_seed(3))
    labels_BS[0, 0], labels_BS[-1, -1] = 0, vocab_size - 1
    labels_BS[1, 2:4] = IGNORED_LABEL
    return labels_BS


def _check(vocab_size: int, padded_vocab_size: int, dtype: torch.dtype, scale: float) -> None:
    group = tensor_group()
    what = f"V={vocab_size} padded to {padded_vocab_size}, {dtype}, scale {scale}"
    labels_BS, grad_BS = _labels(vocab_size), randn(5, 3, 7)
    logits_ref = (scale * randn(4, 3, 7, vocab_size)).to(dtype).float().requires_grad_()
    loss_ref = F.cross_entropy(logits_ref.flatten(0, 1), labels_BS.flatten(), reduction="none").view(3, 7)
    loss_ref.backward(grad_BS)

    padding = padded_vocab_size - vocab_size
    full = F.pad(logits_ref.detach(), (0, padding), value=1e4).to(dtype)  # garbage that must not count
    local = full.chunk(group.size, -1)[group.rank].clone().requires_grad_()
    before = local.detach().clone()
    loss = vocab_parallel_cross_entropy(
        local, labels_BS, group=group, vocab_size=vocab_size, vocab_start=group.rank * local.shape[-1]
    )
    loss.backward(grad_BS)

    assert loss.dtype == torch.float32
    assert_close(loss, loss_ref, FP32_RELATIVE_ERROR, what)
    assert not loss[labels_BS == IGNORED_LABEL].any()
    assert torch.equal(local, before), "the caller's logits were written"
    grad_ref = F.pad(logits_ref.grad, (0, padding)).chunk(group.size, -1)[group.rank]
    assert local.grad is not None
    assert local.grad.dtype == dtype
    if grad_ref.any():
        assert_close(local.grad, grad_ref, BOUNDS[dtype], what)
    tokens_local = max(0, vocab_size - group.rank * local.shape[-1])
    assert not local.grad[..., tokens_local:].any(), "padding has a gradient"
    assert not local.grad[labels_BS == IGNORED_LABEL].any(), "an ignored label has a gradient"


def _check_all(fused: bool) -> None:
    with fusing(fused):
        for vocab_size, padded_vocab_size in [(60, 60), (101, 120), (17, 240)]:  # the last: a rank with padding alone
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for scale in (1.0, 30.0):
                    _check(vocab_size, padded_vocab_size, dtype, scale)
        _check(50_257, 50_304, torch.bfloat16, 1.0)


@FUSED
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sharded_equals_plain(world_size: int, fused: bool) -> None:
    run_on_ranks(world_size, _check_all, fused)


def _is_nan_on_ranks(label: int, fused: bool) -> list[list[bool]]:
    group = tensor_group()
    labels = torch.tensor([[1, label, 99]])
    with fusing(fused):
        loss = vocab_parallel_cross_entropy(
            torch.zeros(1, 3, 60), labels, group=group, vocab_size=100, vocab_start=60 * group.rank
        )
    return loss.isnan().tolist()


@FUSED
@pytest.mark.parametrize("label", [-1, 100, 119, 120])
def test_a_label_of_no_rank_is_nan_on_all(label: int, fused: bool) -> None:
    assert run_on_ranks(2, _is_nan_on_ranks, label, fused) == 2 * [[[False, True, False]]]


@FUSED
def test_overwritten_logits_give_the_same_gradient_and_no_second_one(fused: bool) -> None:
    def draw() -> tuple[Tensor, Tensor]:
        x = randn(4, 3, 7, 16).requires_grad_()
        return x, x @ randn(5, 16, 60)  # as of a linear layer, which does not keep its output

    gradients = []
    for overwrite_logits in (False, True):
        x, logits = draw()
        with fusing(fused):
            loss = vocab_parallel_cross_entropy(
                logits, _labels(50), group=ALONE, vocab_size=50, vocab_start=0, overwrite_logits=overwrite_logits
            )
        loss.backward(randn(6, 3, 7), retain_graph=True)
        assert x.grad is not None
        gradients.append(x.grad.clone())
        if fused and overwrite_logits:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward(randn(6, 3, 7))
        else:
            loss.backward(randn(6, 3, 7))
    assert torch.equal(*gradients)


def test_gradient_is_exact() -> None:
    logits = randn(0, 2, 3, 8, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([[0, 5, IGNORED_LABEL], [2, 4, 1]])

    def loss(logits: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(logits, labels, group=ALONE, vocab_size=6, vocab_start=0)

    assert loss(logits).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, logits)


@FUSED
def test_huge_logits_stay_finite(fused: bool) -> None:
    logits = torch.tensor([[[3e38, -3e38, 0.0]]], requires_grad=True)
    with fusing(fused):
        loss = vocab_parallel_cross_entropy(logits, torch.tensor([[0]]), group=ALONE, vocab_size=3, vocab_start=0)
    loss.sum().backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


@FUSED
@pytest.mark.parametrize("label", [-1, 6, 7, 8])
def test_a_label_outside_the_vocabulary_is_nan(label: int, fused: bool) -> None:
    labels = torch.tensor([[1, label]])
    with fusing(fused):
        loss = vocab_parallel_cross_entropy(torch.zeros(1, 2, 8), labels, group=ALONE, vocab_size=6, vocab_start=0)
    assert loss.isnan().tolist() == [[False, True]]


@FUSED
def test_only_the_logits_themselves_are_kept_for_the_backward(fused: bool) -> None:
    logits = torch.randn(2, 3, 64, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), fusing(fused):
        vocab_parallel_cross_entropy(
            logits, torch.zeros(2, 3, dtype=torch.long), group=ALONE, vocab_size=64, vocab_start=0
        )
    large = [x for x in saved if x.numel() > 6]
    assert [x.data_ptr() for x in large] == [logits.data_ptr()]
