from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megalibi.parallel.collectives import reduce_from_tensor_group
from megalibi.parallel.groups import Group
from megalibi.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    parallel_lm_logits,
)
from megalibi.parallel.layout import WHOLE, Layout
from megalibi.parallel.sequence import scatter_to_sequence, use_replicated_param
from megalibi.parallel.sharding import ShardSpec, get_shard_spec, shard
from tests.support.ranks import run_on_ranks
from tests.support.tensors import (
    BF16_RELATIVE_ERROR,
    FP32_RELATIVE_ERROR,
    assert_close,
    fake_group,
    full_grad,
    load_full,
    randn,
    tensor_group,
)

WORLD_SIZES = [2, 4]
BATCH = 3
IN_FEATURES = 37


def _bound(dtype: torch.dtype) -> float:
    return FP32_RELATIVE_ERROR if dtype == torch.float32 else BF16_RELATIVE_ERROR


def _sequence_slice(x_BSH: Tensor, group: Group) -> Tensor:
    return x_BSH.chunk(group.size, dim=1)[group.rank]


def _check_column(bias: bool, gather: bool, sequence_parallel: bool, parts: int, dtype: torch.dtype) -> None:
    what = f"column {bias=} {gather=} {sequence_parallel=} {parts=} {dtype}"
    group = tensor_group()
    out_features, seq_length = parts * group.size * 5, group.size * 7
    x_full = randn(0, BATCH, seq_length, IN_FEATURES).requires_grad_()
    weight_full = randn(1, out_features, IN_FEATURES).requires_grad_()
    bias_full = randn(2, out_features).requires_grad_() if bias else None
    grad_full = randn(3, BATCH, seq_length, out_features)
    y_full = F.linear(x_full, weight_full, bias_full)
    y_full.backward(grad_full)

    layer = ColumnParallelLinear(
        IN_FEATURES,
        out_features,
        layout=Layout(group, sequence_parallel),
        bias=bias,
        gather_output=gather,
        parts=parts,
    )
    spec = ShardSpec(dim=2, full_size=out_features, parts=parts)
    local = (lambda full: full) if gather else (lambda full: shard(full, spec, group.rank, group.size))
    own_tokens = (lambda full: _sequence_slice(full, group)) if sequence_parallel else (lambda full: full)
    load_full(layer.weight, weight_full.detach(), group)
    if layer.bias is not None and bias_full is not None:
        load_full(layer.bias, bias_full.detach(), group)
    x = own_tokens(x_full.detach()).to(dtype).clone().requires_grad_()
    grad = local(grad_full).to(dtype)
    before = [tensor.detach().clone() for tensor in (x, layer.weight, grad)]
    y = layer(x)
    y.backward(grad)

    assert y.dtype == dtype
    assert_close(y, local(y_full.detach()), _bound(dtype), what)
    assert_close(x.grad, own_tokens(x_full.grad), _bound(dtype), f"{what} x.grad")
    assert_close(full_grad(layer.weight, group), weight_full.grad, _bound(dtype), f"{what} weight.grad")
    if layer.bias is not None and bias_full is not None:
        assert_close(full_grad(layer.bias, group), bias_full.grad, _bound(dtype), f"{what} bias.grad")
    after = [tensor.detach() for tensor in (x, layer.weight, grad)]
    assert all(map(torch.equal, after, before)), f"{what}: a caller's tensor was written"


def _check_columns() -> None:
    flags = (False, True)
    for bias, gather, sequence_parallel, parts in itertools.product(flags, flags, flags, (1, 3)):
        _check_column(bias, gather, sequence_parallel, parts, torch.float32)
    # fp32 parameters under bf16 activations, as with ZeRO 0
    _check_column(True, False, False, 3, torch.bfloat16)
    _check_column(True, True, True, 1, torch.bfloat16)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_column_parallel_linear_equals_plain(world_size: int) -> None:
    run_on_ranks(world_size, _check_columns)


def _check_row(bias: bool, sequence_parallel: bool, dtype: torch.dtype) -> None:
    what = f"row {bias=} {sequence_parallel=} {dtype}"
    group = tensor_group()
    in_features, out_features, seq_length = group.size * 9, 11, group.size * 3
    x_full = randn(0, BATCH, seq_length, in_features).requires_grad_()
    weight_full = randn(1, out_features, in_features).requires_grad_()
    bias_full = randn(2, out_features).requires_grad_() if bias else None
    grad_full = randn(3, BATCH, seq_length, out_features)
    y_full = F.linear(x_full, weight_full, bias_full)
    y_full.backward(grad_full)

    layer = RowParallelLinear(in_features, out_features, layout=Layout(group, sequence_parallel), bias=bias)
    own_tokens = (lambda full: _sequence_slice(full, group)) if sequence_parallel else (lambda full: full)
    load_full(layer.weight, weight_full.detach(), group)
    if layer.bias is not None and bias_full is not None:
        load_full(layer.bias, bias_full.detach(), group)
    own_features = slice(group.rank * 9, (group.rank + 1) * 9)
    x = x_full.detach()[..., own_features].to(dtype).clone().requires_grad_()
    grad = own_tokens(grad_full).to(dtype)
    before = [tensor.detach().clone() for tensor in (x, layer.weight, grad)]
    y = layer(x)
    y.backward(grad)

    assert y.dtype == dtype
    assert_close(y, own_tokens(y_full.detach()), _bound(dtype), what)
    assert x_full.grad is not None
    assert_close(x.grad, x_full.grad[..., own_features], _bound(dtype), f"{what} x.grad")
    assert_close(full_grad(layer.weight, group), weight_full.grad, _bound(dtype), f"{what} weight.grad")
    if layer.bias is not None and bias_full is not None:
        assert_close(layer.bias.grad, bias_full.grad, _bound(dtype), f"{what} bias.grad")
    after = [tensor.detach() for tensor in (x, layer.weight, grad)]
    assert all(map(torch.equal, after, before)), f"{what}: a caller's tensor was written"


def _check_rows() -> None:
    for bias, sequence_parallel, dtype in itertools.product(
        (False, True), (False, True), (torch.float32, torch.bfloat16)
    ):
        _check_row(bias, sequence_parallel, dtype)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_row_parallel_linear_equals_plain(world_size: int) -> None:
    run_on_ranks(world_size, _check_rows)


class _Copies(TorchDispatchMode):
    """Counts the copies of whole tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default)
        return function(*args, **kwargs or {})


def _count_copies() -> tuple[int, int]:
    """Copies in the forward pass of a row-parallel layer, and in a reduction of somebody else's tensor."""
    group = tensor_group()
    layer = RowParallelLinear(group.size * 9, 11, layout=Layout(group))
    load_full(layer.weight, randn(1, 11, group.size * 9), group)
    with _Copies() as own:
        y = layer(randn(0, BATCH, 3, 9))
    with _Copies() as others:
        reduce_from_tensor_group(y, group)
    return own.count, others.count


def test_a_row_parallel_layer_sums_its_product_where_it_stands() -> None:
    assert run_on_ranks(2, _count_copies) == [(0, 1), (0, 1)]


def _check_embedding(tied: bool, sequence_parallel: bool, dtype: torch.dtype) -> None:
    """From token ids through the embedding to logits, with one weight for both or two."""
    what = f"embedding {tied=} {sequence_parallel=} {dtype}"
    group = tensor_group()
    vocab_size, padded_vocab_size, hidden_size, seq_length = 29, 32, 5, group.size * 3
    ids_BS = torch.randint(vocab_size, (BATCH, seq_length), generator=torch.Generator().manual_seed(1))
    ids_BS[0, 0], ids_BS[0, 1] = 0, vocab_size - 1
    fulls = [randn(seed, vocab_size, hidden_size).requires_grad_() for seed in (2, 3)]
    if tied:
        fulls[1] = fulls[0]
    grad_full = randn(4, BATCH, seq_length, vocab_size)
    x_full = F.embedding(ids_BS, fulls[0])
    logits_full = F.linear(x_full.sin(), fulls[1])
    logits_full.backward(grad_full)

    layout = Layout(group, sequence_parallel)
    layers = [VocabParallelEmbedding(vocab_size, padded_vocab_size, hidden_size, layout=layout) for _ in range(2)]
    for layer, full in zip(layers, fulls, strict=True):
        load_full(layer.weight, full.detach(), group)
    if tied:
        layers[1] = layers[0]
    assert layers[0].vocab_start == group.rank * 32 // group.size
    x = layers[0](ids_BS, dtype)
    own_tokens = (lambda full: _sequence_slice(full, group)) if sequence_parallel else (lambda full: full)
    assert torch.equal(x, own_tokens(x_full.detach()).to(dtype)), what
    logits = parallel_lm_logits(x.sin(), layers[1].weight, layout=layout)
    spec = ShardSpec(dim=2, full_size=vocab_size, padding=padded_vocab_size - vocab_size)
    logits.backward(shard(grad_full, spec, group.rank, group.size).to(dtype))
    assert_close(logits, shard(logits_full.detach(), spec, group.rank, group.size), _bound(dtype), what)
    for layer, full in zip(layers, fulls, strict=True):
        assert_close(full_grad(layer.weight, group), full.grad, _bound(dtype), f"{what} weight.grad")


def _check_embeddings() -> None:
    for tied, sequence_parallel, dtype in itertools.product(
        (False, True), (False, True), (torch.float32, torch.bfloat16)
    ):
        _check_embedding(tied, sequence_parallel, dtype)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_embedding_and_logits_equal_plain(world_size: int) -> None:
    run_on_ranks(world_size, _check_embeddings)


class _Mlp(nn.Module):
    """Norm, column, GELU, row, residual: with a sequence-parallel residual stream or without."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.norm_weight = nn.Parameter(torch.empty(hidden_size))
        self.up = ColumnParallelLinear(hidden_size, ffn_hidden_size, bias=True, layout=layout)
        self.down = RowParallelLinear(ffn_hidden_size, hidden_size, bias=True, layout=layout)

    def forward(self, x: Tensor) -> Tensor:
        norm_weight = self.norm_weight
        if self.layout.sequence_parallel:
            norm_weight = use_replicated_param(norm_weight, self.layout.tensor)
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:], norm_weight))))


def _check_mlp(sequence_parallel: bool) -> None:
    group = tensor_group()
    x_full, grad_full = randn(0, 2, 4 * group.size, 6), randn(1, 2, 4 * group.size, 6)
    plain = _Mlp(6, 5 * group.size, WHOLE)
    sharded = _Mlp(6, 5 * group.size, Layout(group, sequence_parallel))
    for seed, (param, full) in enumerate(zip(sharded.parameters(), plain.parameters(), strict=True)):
        full.data.copy_(randn(seed + 2, *full.shape))
        load_full(param, full.detach(), group)
    x_ref, x = x_full.clone().requires_grad_(), x_full.clone().requires_grad_()
    y_ref = plain(x_ref)
    y_ref.backward(grad_full)
    if sequence_parallel:
        y = sharded(scatter_to_sequence(x, group))
        y.backward(_sequence_slice(grad_full, group))
        y_ref = _sequence_slice(y_ref, group)
    else:
        y = sharded(x)
        y.backward(grad_full)
    assert_close(y, y_ref, FP32_RELATIVE_ERROR, f"mlp {sequence_parallel=}")
    assert_close(x.grad, x_ref.grad, FP32_RELATIVE_ERROR, f"mlp {sequence_parallel=} x.grad")
    for (name, param), full in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        assert_close(full_grad(param, group), full.grad, FP32_RELATIVE_ERROR, f"mlp {sequence_parallel=} {name}.grad")


def _check_mlps() -> None:
    _check_mlp(False)
    _check_mlp(True)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_block_equals_plain_with_and_without_sequence_parallelism(world_size: int) -> None:
    run_on_ranks(world_size, _check_mlps)


def test_every_sharded_parameter_says_so() -> None:
    layout = Layout(fake_group(1, 2))
    column = ColumnParallelLinear(4, 12, layout=layout, bias=True, parts=3)
    row = RowParallelLinear(4, 6, layout=layout, bias=True)
    embedding = VocabParallelEmbedding(5, 8, 4, layout=layout)
    assert get_shard_spec(column.weight) == get_shard_spec(column.bias) == ShardSpec(dim=0, full_size=12, parts=3)
    assert get_shard_spec(row.weight) == ShardSpec(dim=1, full_size=4)
    assert get_shard_spec(row.bias) is None
    assert not hasattr(row.bias, "model_parallel")
    assert get_shard_spec(embedding.weight) == ShardSpec(dim=0, full_size=5, padding=3)
    shapes = [tuple(p.shape) for p in (column.weight, column.bias, row.weight, row.bias, embedding.weight)]
    assert shapes == [(6, 4), (6,), (6, 2), (6,), (4, 4)]


def test_sizes_that_do_not_divide_are_refused() -> None:
    layout = Layout(fake_group(0, 4))
    with pytest.raises(ValueError, match="3 x 4 slices do not divide 18"):
        ColumnParallelLinear(4, 18, layout=layout, parts=3)
    with pytest.raises(ValueError, match="do not divide 6"):
        RowParallelLinear(6, 4, layout=layout)
    with pytest.raises(ValueError, match="do not divide 10"):
        VocabParallelEmbedding(9, 10, 4, layout=layout)
