from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalibi.model.block import MLP, Block, LayerNorm, ResidualDropout
from megalibi.model.positions import build_position_method
from megalibi.parallel import ALONE, all_gather_raw, scatter_to_sequence
from tests.support.models import FP32_RELATIVE_ERROR, build_gpt, make_model
from tests.support.ranks import run_on_ranks
from tests.support.tensors import assert_close, randn, tensor_group


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_equals_its_formula(bias: bool) -> None:
    model = make_model(bias=bias, layer_norm_epsilon=0.1)
    norm = LayerNorm(model, group=ALONE, sequence_parallel=False)
    weight, offset = randn(1, model.hidden_size), randn(2, model.hidden_size)
    with torch.no_grad():
        norm.weight.copy_(weight)
        if norm.bias is not None:
            norm.bias.copy_(offset)
    x = randn(3, 2, 5, model.hidden_size)
    centered = x - x.mean(-1, keepdim=True)
    expected = centered / (centered.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight + (offset if bias else 0.0)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(("activation", "function"), [("gelu", F.gelu), ("relu", torch.relu)])
def test_mlp_equals_its_formula(activation: str, function) -> None:
    model = make_model(activation=activation, bias=True)
    mlp = MLP(model, 0, group=ALONE, sequence_parallel=False)
    with torch.no_grad():
        for seed, parameter in enumerate(mlp.parameters()):
            parameter.copy_(randn(seed, *parameter.shape))
    x = randn(9, 2, 5, model.hidden_size)
    expected = function(x @ mlp.up.weight.T + mlp.up.bias) @ mlp.down.weight.T + mlp.down.bias
    torch.testing.assert_close(mlp(x), expected)


def test_block_adds_attention_then_mlp_each_behind_its_norm() -> None:
    model = make_model()
    gpt = build_gpt(model)
    block, bias = gpt.blocks[0], gpt.positions.score_bias(5, torch.device("cpu"))
    x = randn(1, 2, 5, model.hidden_size)
    middle = x + block.attention(block.attention_norm(x)[1], None, bias)
    torch.testing.assert_close(block(x, None, *bias), middle + block.mlp(block.mlp_norm(middle)[1]))


def _drop_ones(sequence_parallel: bool) -> Tensor:
    """What dropout leaves of ones, for two layers x two sites, whole over the sequence."""
    group = tensor_group()
    ones = torch.ones(2, 6, 32)
    kept = []
    for layer in (0, 1):
        dropout = ResidualDropout(0.5, layer, group=group, sequence_parallel=sequence_parallel)
        for site in ("attention output", "mlp output"):
            if sequence_parallel:
                kept.append(all_gather_raw(dropout(scatter_to_sequence(ones, group), site, 3), group, dim=1))
            else:
                kept.append(dropout(ones, site, 3))
    return torch.stack(kept)


def test_trap_7_dropout_outside_has_one_mask_and_under_sequence_parallelism_one_for_each_slice() -> None:
    first, second = run_on_ranks(2, _drop_ones, False)
    assert torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, 2.0}
    assert len(first.flatten(1).unique(dim=0)) == 4  # every layer and site has its own

    first, second = run_on_ranks(2, _drop_ones, True)
    assert torch.equal(first, second)
    assert not torch.equal(first[:, :, :3], first[:, :, 3:])


def _norm_and_bias_grads(sequence_parallel: bool) -> dict[str, Tensor]:
    """Gradients of what every rank holds in full."""
    group = tensor_group()
    model = make_model(bias=True)
    positions = build_position_method(model, group)
    block = Block(model, 0, positions, group=group, sequence_parallel=sequence_parallel)
    block.load_state_dict(build_gpt(model, group).blocks[0].state_dict())
    x = randn(1, 2, 8, model.hidden_size)
    upstream = randn(2, 2, 8, model.hidden_size)
    if sequence_parallel:
        x, upstream = scatter_to_sequence(x, group), scatter_to_sequence(upstream, group)
    block(x, None, *positions.score_bias(8, x.device)).backward(upstream)
    replicated = ("attention_norm.", "mlp_norm.", "proj.bias", "down.bias")
    return {
        name: parameter.grad.clone()
        for name, parameter in block.named_parameters()
        if parameter.grad is not None and any(part in name for part in replicated)
    }


def test_trap_7_gradients_of_norms_and_row_biases_are_whole_under_sequence_parallelism() -> None:
    (expected,) = run_on_ranks(1, _norm_and_bias_grads, False)
    assert len(expected) == 6
    for grads in run_on_ranks(4, _norm_and_bias_grads, True):
        for name, grad in expected.items():
            assert_close(grads[name], grad, FP32_RELATIVE_ERROR, name)


def _dropped_columns(p: float) -> Tensor:
    """What an MLP of identities gives for ones: which columns of its hidden layer this rank drops."""
    group = tensor_group()
    model = make_model(activation="relu", hidden_size=32, ffn_hidden_size=32, activation_dropout=p)
    mlps = [MLP(model, layer, group=group, sequence_parallel=False) for layer in (0, 1)]
    with torch.no_grad():
        for mlp in mlps:
            for linear, dim in ((mlp.up, 0), (mlp.down, 1)):
                linear.weight.copy_(torch.eye(32).chunk(group.size, dim=dim)[group.rank])
    ones = torch.ones(2, 5, 32)
    assert torch.equal(mlps[0](ones), ones)  # no key, no dropout
    return torch.stack([mlp(ones, 3) for mlp in mlps]).detach()


def test_activation_dropout_is_of_the_ranks_own_columns_and_keyed_by_layer() -> None:
    for size in (1, 2):
        by_rank = run_on_ranks(size, _dropped_columns, 0.5)
        assert all(torch.equal(kept, by_rank[0]) for kept in by_rank)  # after the sum over the ranks
        first, second = by_rank[0]
        assert set(first.unique().tolist()) == {0.0, 2.0}
        assert not torch.equal(first, second)
        if size == 2:
            assert not torch.equal(first[..., :16], first[..., 16:])
    assert torch.equal(run_on_ranks(1, _dropped_columns, 0.0)[0], torch.ones(2, 2, 5, 32))


@pytest.mark.parametrize(
    ("fields", "p"), [({}, 0.3), ({"attention_dropout": 0.1}, 0.1), ({"attention_dropout": 0.0}, 0.0)]
)
def test_attention_dropout_is_dropout_unless_it_is_given(fields: dict[str, float], p: float) -> None:
    gpt = build_gpt(make_model(dropout=0.3, **fields))
    assert gpt.blocks[0].attention.dropout_p == p
    assert gpt.blocks[0].dropout.p == gpt.dropout.p == 0.3
