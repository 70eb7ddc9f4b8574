from __future__ import annotations

import math

import torch
from torch import Tensor

from megalibi.model.attention import SelfAttention
from megalibi.model.positions import ScoreBias, build_position_method
from megalibi.parallel import ALONE, WHOLE, Layout
from tests.support.models import make_model
from tests.support.ranks import run_on_ranks
from tests.support.tensors import load_full, randn, tensor_group

HEADS, HIDDEN = 6, 48


def attend_slowly(x_SH: Tensor, qkv: Tensor, proj: Tensor, slopes: list[float]) -> Tensor:
    """One row, head by head and query by query, from the definition."""
    head_dim = HIDDEN // HEADS
    q, k, v = (x_SH @ qkv.T).split(HIDDEN, dim=-1)
    outputs = torch.zeros_like(x_SH)
    for head, slope in enumerate(slopes):
        columns = slice(head * head_dim, (head + 1) * head_dim)
        for i in range(len(x_SH)):
            scores = torch.stack(
                [q[i, columns] @ k[j, columns] / math.sqrt(head_dim) - slope * (i - j) for j in range(i + 1)]
            )
            outputs[i, columns] = scores.softmax(0) @ v[: i + 1, columns]
    return outputs @ proj.T


def test_attention_equals_the_definition() -> None:
    model = make_model(num_attention_heads=HEADS, hidden_size=HIDDEN)
    positions = build_position_method(model, ALONE)
    attention = SelfAttention(model, 0, positions, layout=WHOLE)
    qkv, proj, x = randn(1, 3 * HIDDEN, HIDDEN), randn(2, HIDDEN, HIDDEN), randn(3, 2, 7, HIDDEN)
    load_full(attention.qkv.weight, qkv, ALONE)
    load_full(attention.proj.weight, proj, ALONE)
    # The paper's rule for 6 heads: those of 4, then every second one of 8.
    slopes = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    with torch.no_grad():
        output = attention(x, None, positions.score_bias(7, x.device))
    for row in range(2):
        expected = attend_slowly(x[row].double(), qkv.double(), proj.double(), slopes)
        torch.testing.assert_close(output[row].double(), expected, rtol=1e-4, atol=1e-3)


def _heads_output(micro_batch_key: int | None) -> Tensor:
    """What this rank's heads give, with the same weights on every rank, before the ranks are summed."""
    model = make_model(dropout=0.5, position_method="sinusoidal")  # no slopes, which differ between ranks
    group = tensor_group()
    attention = SelfAttention(model, 0, build_position_method(model, group), layout=Layout(group))
    captured: list[Tensor] = []
    attention.proj.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    with torch.no_grad():
        for seed, parameter in enumerate(attention.parameters()):
            parameter.copy_(randn(seed, *parameter.shape))
        attention(randn(9, 2, 8, model.hidden_size), micro_batch_key, ScoreBias())
    return captured[0]


def test_trap_7_attention_dropout_differs_between_tensor_ranks() -> None:
    without = run_on_ranks(2, _heads_output, None)
    assert torch.equal(without[0], without[1])
    dropped = run_on_ranks(2, _heads_output, 5)
    assert not torch.allclose(dropped[0], dropped[1], atol=0.1)
    again = run_on_ranks(2, _heads_output, 5)
    assert all(torch.equal(a, b) for a, b in zip(dropped, again, strict=True))
