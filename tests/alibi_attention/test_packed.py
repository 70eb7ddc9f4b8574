from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alibi_attention import alibi_slopes, attention, split_qkv
from alibi_attention.packed import empty_gradients
from tests.support.device import DEVICE, ON_GPU

pytestmark = pytest.mark.gpu

# On a GPU one back end alone writes into one buffer; others may add in any order there.
WRITE_INTO_ONE = ["triton"] if ON_GPU else ["triton", "native"]
TO_THE_BIT = ["triton"] if ON_GPU else ["triton", "native", "sdpa", "reference"]
ROWS_AND_DOCUMENTS = pytest.mark.parametrize(
    "cu_seqlens", [None, torch.tensor([0, 40, 90, 140], dtype=torch.int32)], ids=["rows", "documents"]
)


class Operations(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def draw(batch=2, seq_length=70, num_heads=3, head_dim=16, dtype=torch.float32):
    return torch.randn(batch, seq_length, 3, num_heads, head_dim).to(DEVICE, dtype).requires_grad_()


def attend(split, backend, qkv, cu_seqlens):
    return attention(*split(qkv), alibi_slopes=alibi_slopes(3).to(DEVICE), backend=backend, cu_seqlens=cu_seqlens)


def gradient(split, backend, qkv, cu_seqlens):
    output = attend(split, backend, qkv, cu_seqlens)
    (grad,) = torch.autograd.grad(output.square().sum(), qkv)
    return grad


@pytest.mark.parametrize("backend", TO_THE_BIT)
@ROWS_AND_DOCUMENTS
def test_gradients_are_those_of_unbind_to_the_bit(backend, cu_seqlens):
    qkv = draw()
    results = [gradient(split, backend, qkv, cu_seqlens) for split in (split_qkv, lambda x: x.unbind(2))]
    assert results[0].is_contiguous()
    assert torch.equal(*results)


@ROWS_AND_DOCUMENTS
@pytest.mark.parametrize("backend", WRITE_INTO_ONE)
def test_the_gradients_are_written_into_one_buffer_which_is_not_copied(backend, cu_seqlens):
    operations = {}
    for split in (split_qkv, lambda x: x.unbind(2)):
        qkv = draw()
        output = attend(split, backend, qkv, cu_seqlens)
        with Operations() as seen:
            torch.autograd.grad(output, qkv, torch.ones_like(output))
        operations[split is split_qkv] = seen.names
    assert not {"stack", "cat", "clone"} & set(operations[True])
    assert "stack" in operations[False]


def test_what_is_no_part_of_one_tensor_gets_dense_gradients():
    q, k, v = draw().detach().unbind(2)
    assert [x.storage_offset() for x in empty_gradients(q, k, v)] == [0, 48, 96]
    others = {
        "in another order": (k, q, v),
        "of another tensor": (q, k, v.clone()),
        "turned": (q * 1.0, k * 1.0, v),
        "fewer queries": (q[:, 30:], k, v),
        "heads inside": draw().detach().movedim(2, 3).contiguous().unbind(3),
    }
    for name, given in others.items():
        for gradient, x in zip(empty_gradients(*given), given, strict=True):
            assert gradient.shape == x.shape
            assert gradient.is_contiguous(), name


def test_gradients_that_are_no_parts_are_put_together():
    qkv = draw()
    grads = torch.randn(3, 2, 70, 3, 16, device=DEVICE).unbind(0)
    (result,) = torch.autograd.grad(split_qkv(qkv), qkv, grads)
    assert torch.equal(result, torch.stack(grads, 2))
    parts = torch.randn(2, 70, 3, 3, 16, device=DEVICE)
    (result,) = torch.autograd.grad(split_qkv(qkv), qkv, parts.unbind(2))
    assert result.data_ptr() == parts.data_ptr()
    (result,) = torch.autograd.grad(split_qkv(qkv), qkv, parts.unbind(2)[::-1])
    assert torch.equal(result, parts.flip(2))


def test_a_part_that_is_not_used_has_a_gradient_of_0():
    qkv = draw()
    (result,) = torch.autograd.grad(split_qkv(qkv)[1].sum(), qkv)
    assert torch.equal(result, torch.zeros_like(qkv).index_fill(2, torch.tensor([1], device=DEVICE), 1.0))
