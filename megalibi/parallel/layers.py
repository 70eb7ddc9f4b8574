"""Linear layers and embedding, sharded over the tensor group as in Megatron-LM (arXiv:1909.08053, section 3).

A column-parallel layer shards its output features and a row-parallel one its input features, so that a pair of them,
with anything elementwise between, needs one reduction forward and one backward.

Shapes: B batch, S sequence (with sequence parallelism this rank's slice of it, outside the layers), I input features,
O output features, V vocabulary, H hidden. Features may follow any leading dimensions; sequence parallelism wants
[B, S, features].

Parameters are allocated here and not initialised: the model says how each of them starts. They keep their own dtype,
and are cast to the activation's for the matmul.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalibi.parallel.collectives import (
    Pending,
    all_gather_async,
    all_gather_raw,
    all_reduce_async_,
    gather_from_tensor_group,
    reduce_from_tensor_group,
    reduce_scatter_async,
)
from megalibi.parallel.groups import ALONE, Group
from megalibi.parallel.layout import WHOLE, Layout
from megalibi.parallel.products import linear, matmul
from megalibi.parallel.sequence import SEQUENCE_DIM, reduce_scatter_to_sequence, use_replicated_param
from megalibi.parallel.sharding import ShardSpec, set_shard_spec


class _LinearInTensorGroup(Function):
    """``x @ weight.T + bias`` behind f (or g of arXiv:2205.05198), with communication and matmul overlapped.

    In the backward pass the collective that sums the input's gradient over the group runs while the weight's gradient
    is computed. Under sequence parallelism the gathered input is not kept but gathered again, during the first matmul.

    A row-parallel layer's sum over ``output_group`` (g) is part of this function, because the product is a tensor of
    its own, which the sum may overwrite. Outside of it, the sum would have to begin with a copy.

    The parameter itself is saved and not its cast: DeepSpeed ZeRO 3 empties ``weight.data`` after the forward pass and
    fills it again before the backward pass, and a saved cast would keep the memory.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, output_group: Group = ALONE
    ) -> Tensor:
        ctx.layout = layout
        ctx.bias_dtype = None if bias is None else bias.dtype
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.weight_dtype = weight.dtype
        if layout.sequence_parallel:
            x = all_gather_raw(x, layout.tensor, SEQUENCE_DIM)
        y = linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return all_reduce_async_(y.contiguous(), output_group).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_weight:
            x_pending = all_gather_async(x, layout.tensor, SEQUENCE_DIM) if layout.sequence_parallel else Pending(x)
        if needs_x:
            grad_x_partial = matmul(grad, weight.to(grad.dtype))
            if layout.sequence_parallel:
                grad_x_pending = reduce_scatter_async(grad_x_partial, layout.tensor, SEQUENCE_DIM)
            else:
                grad_x_pending = all_reduce_async_(grad_x_partial, layout.tensor)
        grad_rows = grad.reshape(-1, grad.shape[-1])
        if needs_weight:
            x = x_pending.wait()
            grad_weight = matmul(grad_rows.T, x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype)
        if needs_bias:
            grad_bias = grad_rows.sum(0).to(ctx.bias_dtype)
        if needs_x:
            grad_x = grad_x_pending.wait()
        return grad_x, grad_weight, grad_bias, None, None


class ColumnParallelLinear(nn.Module):
    """A linear layer whose output features are sharded: ``y_local = x @ weight_local.T + bias_local``.

    Args:
        in_features: I, whole.
        out_features: O, whole; the group divides each of its parts.
        layout: Under sequence parallelism the input is this rank's slice of the sequence; the output always has the
            whole sequence.
        bias: Adds a bias, sharded like the output.
        gather_output: Returns all output features on every rank instead of this rank's.
        parts: Number of equal parts of the output that are sharded each on its own, 3 for a fused q, k, v.
        dtype: The type of the parameters; None takes torch's default.
        device: The device of the parameters.

    Raises:
        ValueError: The group does not divide the parts.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        layout: Layout,
        bias: bool = False,
        gather_output: bool = False,
        parts: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.parts = parts
        self.gather_output = gather_output
        spec = ShardSpec(dim=0, full_size=out_features, parts=parts)
        out_features_local = spec.local_size(layout.tensor.size)
        self.weight = nn.Parameter(torch.empty(out_features_local, in_features, dtype=dtype, device=device))
        set_shard_spec(self.weight, spec)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features_local, dtype=dtype, device=device))
            set_shard_spec(self.bias, spec)

    def forward(self, x: Tensor) -> Tensor:
        """Return [.., O / size], or [.., O] with ``gather_output``, from [.., I]."""
        y = _LinearInTensorGroup.apply(x, self.weight, self.bias, self.layout)
        if not self.gather_output:
            return y
        y = gather_from_tensor_group(y, self.layout.tensor)
        # Gathered by rank, then part; the full tensor goes by part, then rank.
        return y.unflatten(-1, (self.layout.tensor.size, self.parts, -1)).transpose(-3, -2).flatten(-3)


class RowParallelLinear(nn.Module):
    """A linear layer whose input features are sharded: ``y = sum over ranks of x_local @ weight_local.T, + bias``.

    Args:
        in_features: I, whole; the group divides it.
        out_features: O, whole.
        layout: Under sequence parallelism the output is this rank's slice of the sequence; the input always has the
            whole sequence.
        bias: Adds a bias, once, after the sum; every rank holds all of it.
        dtype: The type of the parameters; None takes torch's default.
        device: The device of the parameters.

    Raises:
        ValueError: The group does not divide the input features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        layout: Layout,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        spec = ShardSpec(dim=1, full_size=in_features)
        in_features_local = spec.local_size(layout.tensor.size)
        self.weight = nn.Parameter(torch.empty(out_features, in_features_local, dtype=dtype, device=device))
        set_shard_spec(self.weight, spec)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return [.., O] from [.., I / size]."""
        sequence_parallel, group = self.layout.sequence_parallel, self.layout.tensor
        # WHOLE: the input is already sharded, so the backward sums nothing over the group.
        y = _LinearInTensorGroup.apply(x, self.weight, None, WHOLE, ALONE if sequence_parallel else group)
        if sequence_parallel:
            y = reduce_scatter_to_sequence(y, group)
        if self.bias is None:
            return y
        bias = use_replicated_param(self.bias, group) if sequence_parallel else self.bias
        return y + bias.to(y.dtype)


class VocabParallelEmbedding(nn.Module):
    """An embedding whose vocabulary is sharded: a rank looks up the tokens it holds, and the group adds up.

    Args:
        vocab_size: V, without padding.
        padded_vocab_size: V with padding, which the group divides.
        hidden_size: H.
        layout: Under sequence parallelism the output is this rank's slice of the sequence.
        dtype: The type of the weight; None takes torch's default.
        device: The device of the weight.

    Attributes:
        vocab_start: The first token of this rank.

    Raises:
        ValueError: The group does not divide the padded vocabulary.
    """

    def __init__(
        self,
        vocab_size: int,
        padded_vocab_size: int,
        hidden_size: int,
        *,
        layout: Layout,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        spec = ShardSpec(dim=0, full_size=vocab_size, padding=padded_vocab_size - vocab_size)
        self.vocab_size_local = spec.local_size(layout.tensor.size)
        self.vocab_start = layout.tensor.rank * self.vocab_size_local
        self.weight = nn.Parameter(torch.empty(self.vocab_size_local, hidden_size, dtype=dtype, device=device))
        set_shard_spec(self.weight, spec)

    def forward(self, ids_BS: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return [B, S, H], in ``dtype`` or else the weight's."""
        ids_BS = ids_BS - self.vocab_start
        elsewhere_BS = (ids_BS < 0) | (ids_BS >= self.vocab_size_local)
        x_BSH = F.embedding(ids_BS.masked_fill(elsewhere_BS, 0), self.weight)
        # Cast before the sum: it halves the traffic, and is exact because all ranks but one add zeros.
        x_BSH = x_BSH.to(dtype or x_BSH.dtype).masked_fill(elsewhere_BS.unsqueeze(-1), 0.0)
        if self.layout.sequence_parallel:
            return reduce_scatter_to_sequence(x_BSH, self.layout.tensor)
        return reduce_from_tensor_group(x_BSH, self.layout.tensor)


def parallel_lm_logits(x_BSH: Tensor, weight_VH: Tensor, *, layout: Layout) -> Tensor:
    """Return this rank's logits [B, S, V / size], column-parallel, with a weight that may be tied to the embedding.

    Args:
        x_BSH: The last hidden states; under sequence parallelism this rank's slice of the sequence.
        weight_VH: This rank's rows of the output embedding.
        layout: As for ColumnParallelLinear.
    """
    return _LinearInTensorGroup.apply(x_BSH, weight_VH, None, layout)
