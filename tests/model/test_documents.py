"""A model reads the boundaries of its documents once, for all of its layers, and waits for the device in none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import megalibi.model.attention
from alibi_attention import PackedDocuments
from megalibi.model import GPT
from tests.support.device import DEVICE, ON_GPU
from tests.support.models import build_gpt, make_model, random_tokens

BOUNDARIES = torch.tensor([0, 5, 12, 13, 24], dtype=torch.int32)
LAYERS, PASSES = 2, 2


class _NoScalars(TorchDispatchMode):
    """Refuses what would read a number back from a device: on a CPU that is seen here alone."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default, "a number is read back"
        return function(*args, **kwargs or {})


@contextlib.contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Let everything fail that makes the host wait for the device."""
    if not ON_GPU:
        with _NoScalars():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Tensors that were read whole, which no dispatch mode sees."""
    read: list[Tensor] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: (read.append(x), tolist(x))[1])
    return read


def make_step(**fields: Any) -> Callable[[], Tensor]:
    """A forward and backward pass with documents, once done: slopes are on the device, kernels are compiled."""
    head = {"hidden_size": 64, "num_attention_heads": 4, "num_layers": LAYERS}
    gpt: GPT = build_gpt(make_model(**head, **fields)).to(DEVICE)
    tokens, labels = (x.to(DEVICE) for x in random_tokens(2, 12))

    def step() -> Tensor:
        losses: Tensor = gpt(tokens, labels, cu_seqlens=BOUNDARIES)
        losses.sum().backward()
        return losses

    step()
    return step


# On a GPU: the first that a training takes there, and the one that takes any bias.
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "sdpa"] if ON_GPU else ["auto", "triton", "sdpa"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_step_with_documents_reads_their_boundaries_once_and_waits_for_nothing(
    backend: str, recompute: str, reads: list[Tensor]
) -> None:
    step = make_step(attention_backend=backend, recompute=recompute)
    reads.clear()
    with refusing_to_wait():
        step()
    assert sum(read.shape == BOUNDARIES.shape for read in reads) == 1
    assert all(read.device.type == "cpu" for read in reads)


@pytest.mark.gpu
def test_what_reads_a_number_back_is_seen() -> None:
    number = torch.ones((), device=DEVICE)
    with pytest.raises((AssertionError, RuntimeError)), refusing_to_wait():
        number.item()


@pytest.mark.gpu
def test_all_layers_and_their_recomputations_have_the_same_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[PackedDocuments] = []
    attention = megalibi.model.attention.attention

    def spy(*tensors: Tensor, **arguments: Any) -> Tensor:
        given.append(arguments["cu_seqlens"])
        return attention(*tensors, **arguments)

    monkeypatch.setattr(megalibi.model.attention, "attention", spy)
    step = make_step(recompute="full", attention_backend="auto" if ON_GPU else "triton")
    given.clear()  # of the pass in make_step
    step()
    assert len(given) == LAYERS * PASSES
    assert len({id(documents) for documents in given}) == 1
    assert given[0].lengths == (5, 7, 1, 11)
    step()
    assert len({id(documents) for documents in given}) == 2  # another batch has its own
