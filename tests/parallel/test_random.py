from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalibi.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megalibi.parallel.layout import Layout
from megalibi.parallel.random import ROWS_PER_BLOCK, derive_key, dropout_key, fork_rng, init_normal_, keyed_dropout
from megalibi.parallel.sharding import get_shard_spec, unshard
from tests.support.ranks import run_on_ranks
from tests.support.tensors import fake_group, tensor_group

CPU = torch.device("cpu")
ROWS = 4 * 3 * 65  # more than 3 blocks of rows; shards begin and end inside of blocks
LAYERS = {
    "column": lambda group: ColumnParallelLinear(5, ROWS, layout=Layout(group)),
    "fused": lambda group: ColumnParallelLinear(5, ROWS, parts=3, layout=Layout(group)),
    "row": lambda group: RowParallelLinear(20, ROWS, layout=Layout(group)),
    "vocab": lambda group: VocabParallelEmbedding(ROWS - 17, ROWS + 4 * 300, 6, layout=Layout(group)),
    "bf16": lambda group: ColumnParallelLinear(5, ROWS, layout=Layout(group), dtype=torch.bfloat16),
}


def _init_full(kind: str, size: int) -> Tensor:
    weights = []
    for rank in range(size):
        weight = LAYERS[kind](fake_group(rank, size)).weight
        init_normal_(weight, seed=11, name="block.weight", std=0.02, rank=rank, size=size)
        weights.append(weight.detach())
    spec = get_shard_spec(weight)
    assert spec is not None
    assert sum(w.count_nonzero().item() for w in weights) == weights[0].shape[1 - spec.dim] * spec.full_size
    return unshard(weights, spec)


@pytest.mark.parametrize("kind", LAYERS)
def test_initial_weights_do_not_depend_on_the_tensor_parallel_size(kind: str) -> None:
    full = _init_full(kind, 1)
    assert torch.equal(full, _init_full(kind, 2))
    assert torch.equal(full, _init_full(kind, 4))
    assert full.shape[0] > 2 * ROWS_PER_BLOCK
    assert len(full.unique(dim=0)) == len(full), "two rows are the same"
    assert full.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert full.float().mean().item() == pytest.approx(0.0, abs=0.002)


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    def draw(seed: int, name: str) -> Tensor:
        param = nn.Parameter(torch.empty(9, 4))
        init_normal_(param, seed=seed, name=name, std=1.0, rank=1, size=2)
        return param.detach()

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(0, "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(draw(0, "a"), first)
    assert not torch.equal(draw(1, "a"), first)
    assert not torch.equal(draw(0, "b"), first)


def test_keys() -> None:
    assert derive_key(1, "a") == 5517691062569820736, "a change breaks resuming older runs"
    assert derive_key(np.int64(1), "a") == derive_key(1, "a")
    keys = [derive_key(*parts) for parts in [(1, 23), (12, 3), ("1", 23), (1, "23"), (123,), (1, 2, 3)]]
    assert len(set(keys)) == len(keys)
    base = {"layer": 0, "site": "mlp", "shard_rank": None}
    others = [{}, {"layer": 1}, {"site": "attention"}, {"shard_rank": 0}, {"shard_rank": 1}]
    assert len({dropout_key(5, **{**base, **other}) for other in others}) == len(others)  # type: ignore[arg-type]
    assert dropout_key(5, **base) != dropout_key(6, **base)  # type: ignore[arg-type]
    assert all(0 <= key < 2**63 for key in keys)


def test_dropout_on_the_meta_device_has_the_form_of_that_on_a_cpu() -> None:
    for device in ("meta", "cpu"):
        x = torch.empty(2, 3, 5, dtype=torch.bfloat16, device=device).transpose(1, 2).requires_grad_()
        y = keyed_dropout(x, 0.25, key=3)
        (grad,) = torch.autograd.grad(y, x, torch.empty_like(y))
        for result in (y, grad):
            assert (result.shape, result.dtype, result.device.type) == (x.shape, x.dtype, device)
    state = torch.get_rng_state()
    keyed_dropout(torch.empty(2, 3, device="meta"), 0.25, key=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_right_on_average_and_in_its_gradient() -> None:
    x = torch.ones(200, 300, requires_grad=True)
    y = keyed_dropout(x, 0.25, key=3)
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert y.max().item() == pytest.approx(1 / 0.75)
    # The gradient's strides are not those of the input: the mask must not follow them.
    grad = torch.randn(300, 200).T
    y.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(y == 0, 0.0, grad / 0.75))
    assert keyed_dropout(x, 0.0, key=3) is x
    assert keyed_dropout(x.bfloat16(), 0.5, key=3).dtype == torch.bfloat16


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_a_probability_outside_its_range_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"^p=.*: must be at least 0 and below 1, as a probability of dropping$"):
        keyed_dropout(torch.ones(2), p, key=0)


def test_dropout_leaves_global_random_state_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    keyed_dropout(torch.ones(100, requires_grad=True), 0.5, key=3).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    with fork_rng(5, CPU):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(KeyError), fork_rng(5, CPU):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)


def _attend(q: Tensor, key: int) -> Tensor:
    with fork_rng(key, q.device):
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.3, is_causal=True)


def test_fork_rng_keys_fused_dropout() -> None:
    q = torch.randn(1, 2, 8, 4)
    first = _attend(q, 1)
    torch.rand(1)
    assert torch.equal(_attend(q, 1), first)
    assert not torch.equal(_attend(q, 2), first)


def _block(x: Tensor, micro_batch_key: int, tensor_rank: int) -> Tensor:
    """Dropout outside, inside (attention probabilities), outside a tensor-parallel region."""
    x = keyed_dropout(x, 0.2, dropout_key(micro_batch_key, layer=0, site="hidden", shard_rank=None))
    x = _attend(x, dropout_key(micro_batch_key, layer=0, site="attention", shard_rank=tensor_rank))
    return keyed_dropout(x.sin(), 0.2, dropout_key(micro_batch_key, layer=1, site="hidden", shard_rank=None))


def test_activation_recomputation_replays_the_masks() -> None:
    x, x_ref = (torch.arange(64.0).reshape(1, 2, 8, 4).div(64).requires_grad_() for _ in range(2))
    y_ref = _block(x_ref, 77, 1)
    y_ref.backward(torch.ones_like(y_ref))
    y = checkpoint(_block, x, 77, 1, use_reentrant=False, preserve_rng_state=False)
    torch.rand(1)
    y.backward(torch.ones_like(y))
    assert torch.equal(y, y_ref)
    assert x.grad is not None
    assert x_ref.grad is not None
    assert torch.equal(x.grad, x_ref.grad)


def _draw_masks() -> tuple[Tensor, Tensor]:
    group = tensor_group()
    x = torch.ones(50, 20)
    torch.manual_seed(group.rank)  # what the ranks do not share must not matter
    outside = keyed_dropout(x, 0.5, dropout_key(9, layer=2, site="hidden", shard_rank=None))
    inside = keyed_dropout(x, 0.5, dropout_key(9, layer=2, site="attention", shard_rank=group.rank))
    return outside, inside


def test_masks_are_equal_outside_the_tensor_parallel_region_and_differ_inside() -> None:
    outside, inside = zip(*run_on_ranks(4, _draw_masks), strict=True)
    for rank in range(1, 4):
        assert torch.equal(outside[rank], outside[0])
        for other in range(rank):
            agreement = (inside[rank] == inside[other]).float().mean().item()
            assert agreement == pytest.approx(0.5, abs=0.1), "masks of two ranks are not independent"
