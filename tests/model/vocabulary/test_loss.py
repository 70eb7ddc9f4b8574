from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalibi.model.vocabulary.loss import LOSS_CHUNK_TOKENS, token_losses
from megalibi.parallel import WHOLE, Layout, ShardSpec, shard
from tests.support.ranks import run_on_ranks
from tests.support.tensors import randn, tensor_group

VOCAB_SIZE, PADDED, HIDDEN = 61, 64, 8
SEQ_LENGTH = 2 * LOSS_CHUNK_TOKENS + 97


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(VOCAB_SIZE, (2, SEQ_LENGTH), generator=torch.Generator().manual_seed(2))
    labels[0, ::5] = -100
    return randn(0, 2, SEQ_LENGTH, HIDDEN), randn(1, VOCAB_SIZE, HIDDEN), labels


def _losses(with_grad: bool, sequence_parallel: bool) -> Tensor:
    x, weight, labels = inputs()
    group = tensor_group()
    if sequence_parallel:  # 4291 tokens do not divide
        x, labels = x[:, :-1].chunk(group.size, dim=1)[group.rank], labels[:, :-1]
    spec = ShardSpec(dim=0, full_size=VOCAB_SIZE, padding=PADDED - VOCAB_SIZE)
    local = shard(weight, spec, group.rank, group.size)
    with torch.set_grad_enabled(with_grad):
        return token_losses(
            x,
            local,
            labels,
            layout=Layout(group, sequence_parallel),
            vocab_size=VOCAB_SIZE,
            vocab_start=group.rank * len(local),
        )


@pytest.mark.parametrize(("size", "sequence_parallel"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("with_grad", [True, False])
def test_losses_equal_torch_cut_in_chunks_or_not(size: int, sequence_parallel: bool, with_grad: bool) -> None:
    x, weight, labels = inputs()
    expected = F.cross_entropy((x @ weight.T).transpose(1, 2), labels, reduction="none")
    for losses in run_on_ranks(size, _losses, with_grad, sequence_parallel):
        torch.testing.assert_close(losses, expected[:, : losses.shape[1]], rtol=1e-5, atol=1e-5)
        assert losses.shape[1] == SEQ_LENGTH - sequence_parallel


class _LogitsTokens(TorchDispatchMode):
    """Notes for how many tokens each tensor of logits is."""

    def __init__(self) -> None:
        super().__init__()
        self.token_counts: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim() > 1 and result.shape[-1] == VOCAB_SIZE:
            self.token_counts.add(result.numel() // VOCAB_SIZE)
        return result


@pytest.mark.parametrize(("with_grad", "most_tokens"), [(True, 2 * SEQ_LENGTH), (False, LOSS_CHUNK_TOKENS)])
def test_evaluation_holds_the_logits_of_one_chunk_at_a_time(with_grad: bool, most_tokens: int) -> None:
    x, weight, labels = inputs()
    with _LogitsTokens() as noted, torch.set_grad_enabled(with_grad):
        token_losses(x, weight, labels, layout=WHOLE, vocab_size=VOCAB_SIZE, vocab_start=0)
    assert max(noted.token_counts) == most_tokens
