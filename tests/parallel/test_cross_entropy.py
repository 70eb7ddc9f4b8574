from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalibi.parallel.cross_entropy import IGNORED_LABEL, vocab_parallel_cross_entropy
from megalibi.parallel.groups import ALONE
from tests.parallel.helpers import FP32_RELATIVE_ERROR, assert_close, randn, tensor_group
from tests.ranks import run_on_ranks

BF16_HALF_ULP = 2.0**-8
"""Relative error of rounding to bf16, once."""
WORLD_SIZES = [2, 4]


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
        assert_close(local.grad, grad_ref, FP32_RELATIVE_ERROR if dtype == torch.float32 else BF16_HALF_ULP, what)
    tokens_local = max(0, vocab_size - group.rank * local.shape[-1])
    assert not local.grad[..., tokens_local:].any(), "padding has a gradient"
    assert not local.grad[labels_BS == IGNORED_LABEL].any(), "an ignored label has a gradient"


def _check_all() -> None:
    for vocab_size, padded_vocab_size in [(60, 60), (101, 120), (17, 240)]:  # the last: a rank with padding alone
        for dtype in (torch.float32, torch.bfloat16):
            for scale in (1.0, 30.0):
                _check(vocab_size, padded_vocab_size, dtype, scale)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sharded_equals_plain(world_size: int) -> None:
    run_on_ranks(world_size, _check_all)


def test_gradient_is_exact() -> None:
    logits = randn(0, 2, 3, 8, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([[0, 5, IGNORED_LABEL], [2, 4, 1]])

    def loss(logits: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(logits, labels, group=ALONE, vocab_size=6, vocab_start=0)

    assert loss(logits).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, logits)


def test_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[[3e38, -3e38, 0.0]]], requires_grad=True)
    loss = vocab_parallel_cross_entropy(logits, torch.tensor([[0]]), group=ALONE, vocab_size=3, vocab_start=0)
    loss.sum().backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("label", [-1, 6, 7, 8])
def test_a_label_outside_the_vocabulary_is_nan(label: int) -> None:
    labels = torch.tensor([[1, label]])
    loss = vocab_parallel_cross_entropy(torch.zeros(1, 2, 8), labels, group=ALONE, vocab_size=6, vocab_start=0)
    assert loss.isnan().tolist() == [[False, True]]


def test_only_the_logits_themselves_are_kept_for_the_backward() -> None:
    logits = torch.randn(2, 3, 64, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        vocab_parallel_cross_entropy(
            logits, torch.zeros(2, 3, dtype=torch.long), group=ALONE, vocab_size=64, vocab_start=0
        )
    large = [x for x in saved if x.numel() > 6]
    assert [x.data_ptr() for x in large] == [logits.data_ptr()]
