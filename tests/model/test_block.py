from __future__ import annotations

import torch
from torch import Tensor

from megalibi.model.block import Block
from megalibi.model.positions import build_position_method
from megalibi.parallel import Layout, scatter_to_sequence
from tests.support.models import FP32_RELATIVE_ERROR, build_gpt, make_model
from tests.support.ranks import run_on_ranks
from tests.support.tensors import assert_close, randn, tensor_group


def test_block_adds_attention_then_mlp_each_behind_its_norm() -> None:
    model = make_model()
    gpt = build_gpt(model)
    block, bias = gpt.blocks[0], gpt.positions.score_bias(5, torch.device("cpu"))
    x = randn(1, 2, 5, model.hidden_size)
    middle = x + block.attention(block.attention_norm(x)[1], None, bias)
    torch.testing.assert_close(block(x, None, bias), middle + block.mlp(block.mlp_norm(middle)[1]))


def _norm_and_bias_grads(sequence_parallel: bool) -> dict[str, Tensor]:
    """Gradients of what every rank holds in full."""
    group = tensor_group()
    model = make_model(bias=True)
    positions = build_position_method(model, group)
    block = Block(model, 0, positions, layout=Layout(group, sequence_parallel))
    block.load_state_dict(build_gpt(model, group).blocks[0].state_dict())
    x = randn(1, 2, 8, model.hidden_size)
    upstream = randn(2, 2, 8, model.hidden_size)
    if sequence_parallel:
        x, upstream = scatter_to_sequence(x, group), scatter_to_sequence(upstream, group)
    block(x, None, positions.score_bias(8, x.device)).backward(upstream)
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
