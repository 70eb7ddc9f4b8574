from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalibi.model.layers import MLP, LayerNorm
from megalibi.parallel import WHOLE, Layout
from tests.support.models import make_model
from tests.support.ranks import run_on_ranks
from tests.support.tensors import randn, tensor_group


@pytest.mark.parametrize("linear_bias", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_equals_its_formula(bias: bool, linear_bias: bool) -> None:
    model = make_model(bias=linear_bias, norm_bias=bias, layer_norm_epsilon=0.1)
    norm = LayerNorm(model, layout=WHOLE)
    weight, offset = randn(1, model.hidden_size), randn(2, model.hidden_size)
    with torch.no_grad():
        norm.weight.copy_(weight)
        assert (norm.bias is not None) == bias
        if norm.bias is not None:
            norm.bias.copy_(offset)
    x = randn(3, 2, 5, model.hidden_size)
    centered = x - x.mean(-1, keepdim=True)
    expected = centered / (centered.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight + (offset if bias else 0.0)
    torch.testing.assert_close(norm(x), expected)


def _gelu_of_bloom(x: Tensor) -> Tensor:
    """What transformers' Bloom computes: its constant is sqrt(2 / pi) in nine digits."""
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


@pytest.mark.parametrize(
    ("activation", "function"), [("gelu", F.gelu), ("gelu_tanh", _gelu_of_bloom), ("relu", torch.relu)]
)
def test_mlp_equals_its_formula(activation: str, function) -> None:
    model = make_model(activation=activation, bias=True)
    mlp = MLP(model, 0, layout=WHOLE)
    with torch.no_grad():
        for seed, parameter in enumerate(mlp.parameters()):
            parameter.copy_(randn(seed, *parameter.shape))
    x = randn(9, 2, 5, model.hidden_size)
    expected = function(x @ mlp.up.weight.T + mlp.up.bias) @ mlp.down.weight.T + mlp.down.bias
    torch.testing.assert_close(mlp(x), expected)


def _dropped_columns(p: float) -> Tensor:
    """What an MLP of identities gives for ones: which columns of its hidden layer this rank drops."""
    group = tensor_group()
    model = make_model(activation="relu", hidden_size=32, ffn_hidden_size=32, activation_dropout=p)
    mlps = [MLP(model, layer, layout=Layout(group)) for layer in (0, 1)]
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
