"""What DeepSpeed (0.19.8) allocates and sends around the model's own step, stage by stage, replayed on meta tensors.

Each class is a stage as engine/ds_config.py sets it up: contiguous gradients, reductions and accumulation in fp32. They
make the tensors that DeepSpeed makes, in its order, and say nothing of what is in them; tests hold them to the real
engine. Which stage and precision runs which code:

====== ============ ======================================
stage  precision    DeepSpeed
====== ============ ======================================
0      all          the engine alone, in fp32
1      bf16         bf16_optimizer.py
1      fp32, fp16   zero/stage_1_and_2.py: plan_zero12.py
2      all          zero/stage_1_and_2.py: plan_zero12.py
3      all          zero/stage3.py: plan_zero3.py
====== ============ ======================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors as flatten

from megalibi.config import Config
from megalibi.parallel import Group
from megalibi.plan.memory_trace import GRADIENTS, OPTIMIZER_STATES, WEIGHTS, MemoryTrace

ENGINE_BUCKET_ELEMENTS = 500_000_000
"""Of the engine's own reductions (engine.py, buffered_allreduce_fallback): stages 0 and, in bf16, 1."""
FLAT_ALIGNMENT = 2
"""Flat buffers are a multiple of this times the data ranks (nccl_start_alignment_factor)."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What a stage needs to know of the rank that is planned."""

    config: Config
    """The run."""
    model: nn.Module
    """Its parameters on the meta device, in the dtype they train in."""
    data: Group
    """The data ranks, and the planned one's place among them."""
    trace: MemoryTrace
    """Told what the tensors are."""
    overlap: bool
    """Reductions run beside the backward pass, as on CUDA."""

    @property
    def moments(self) -> int:
        """Numbers that the optimizer keeps for each weight."""
        return 1 if self.config.optimizer.kind == "nesterov" else 2

    @property
    def groups(self) -> list[list[nn.Parameter]]:
        """Matrices and vectors, as engine/optimizer.py has them."""
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() > 1]
        return [matrices, [parameter for parameter in self.model.parameters() if parameter.dim() <= 1]]

    def hold(self, elements: int, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Allocate a flat tensor of a kind."""
        tensor = torch.empty(elements, dtype=dtype, device="meta")
        self.trace.mark(tensor, kind)
        return tensor

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over the data ranks."""
        if self.data.size > 1:
            dist.all_reduce(tensor, group=self.data.handle)

    def all_gather(self, whole: Tensor) -> None:
        """Fill a flat tensor from every data rank's part of it."""
        if self.data.size > 1:
            parts = whole.view(self.data.size, -1)
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            gather(whole, parts[self.data.rank], group=self.data.handle)

    def reduce_scatter(self, whole: Tensor) -> None:
        """Sum a tensor over the data ranks and keep a part; DeepSpeed asks for it on one rank too."""
        if not self.overlap:
            whole.clone()  # gloo's way
        if self.data.size > 1:
            scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            scatter(whole.view(self.data.size, -1)[self.data.rank], whole.view(-1), group=self.data.handle)


class Stage0:
    """Nothing is cut: fp32 weights, their gradients, the optimizer's moments; gradients are reduced at the end."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.states = [
            rank.hold(p.numel(), OPTIMIZER_STATES) for group in rank.groups for p in group for _ in range(rank.moments)
        ]

    def begin_micro_step(self, last: bool) -> None:
        """Come before the forward pass; ``last``: the optimizer steps after it."""

    def take_gradient(self, parameter: nn.Parameter) -> None:
        """Come after autograd has put a gradient into ``parameter.grad``."""

    def end_micro_step(self, last: bool) -> None:
        """Come after the backward pass."""
        if last:
            gradients = [p.grad for p in self.rank.model.parameters() if p.grad is not None]
            all_reduce_in_buckets(self.rank, gradients)

    def step(self) -> None:
        """Come with the optimizer's step."""
        for parameter in self.rank.model.parameters():
            parameter.grad = None


def all_reduce_in_buckets(rank: Rank, tensors: Sequence[Tensor]) -> None:
    """Reduce copies of the tensors, filled up bucket by bucket (engine.py, allreduce_no_retain)."""
    for bucket in fill_buckets(tensors, ENGINE_BUCKET_ELEMENTS):
        rank.all_reduce(flatten(bucket))


def fill_buckets(tensors: Iterable[Tensor], elements: int) -> Iterator[list[Tensor]]:
    """Put tensors into buckets; one is full when it has more than so many elements."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) > elements:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


class FlatStage(Stage0):
    """16-bit or fp32 weights in one flat tensor a group, and this rank's part of fp32 masters and moments."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.flat_weights: list[Tensor] = []
        self.states: list[Tensor] = []
        alignment = FLAT_ALIGNMENT * rank.data.size
        for group in rank.groups:
            elements = sum(p.numel() for p in group)
            flat = rank.hold(_round_up(elements, alignment), WEIGHTS, group[0].dtype)
            self.flat_weights.append(flat)
            start = 0
            for p in group:
                p.data = flat[start : start + p.numel()].view(p.shape)
                start += p.numel()
            self.states += [rank.hold(len(flat) // rank.data.size, OPTIMIZER_STATES) for _ in range(1 + rank.moments)]

    def gather_weights(self) -> None:
        """Every rank has updated its part."""
        for flat in self.flat_weights:
            self.rank.all_gather(flat)


def _round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


class Stage1Bf16(FlatStage):
    """The whole model's gradients in fp32 on every rank; in bf16 each only until it is added to them."""

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank)
        self.gradients = [rank.hold(len(flat), GRADIENTS) for flat in self.flat_weights]

    def take_gradient(self, parameter: nn.Parameter) -> None:
        """Add it to the step's, and drop it."""
        parameter.grad = None

    def end_micro_step(self, last: bool) -> None:
        """Reduce at the end."""
        if last:
            all_reduce_in_buckets(self.rank, self.gradients)

    def step(self) -> None:
        """Update, gather, drop the gradients."""
        self.gather_weights()
        super().step()
