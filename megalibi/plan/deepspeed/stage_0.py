"""What DeepSpeed 0.19.8 allocates and sends around the model's own step without ZeRO, replayed on meta tensors.

Each class of this package is a stage as engine/ds_config.py sets it up: contiguous gradients, reductions and
accumulation in fp32. It makes the tensors that DeepSpeed makes, in the same order, without their contents; tests hold
it to the real engine. Which code of DeepSpeed runs depends on stage and precision:

====== ============ ======================================
stage  precision    DeepSpeed
====== ============ ======================================
0      all          the engine alone, in fp32
1      bf16         bf16_optimizer.py
1      fp32, fp16   zero/stage_1_and_2.py
2      all          zero/stage_1_and_2.py
3      all          zero/stage3.py
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
"""Size of the buckets that the engine itself reduces (engine.py, buffered_allreduce_fallback), in stage 0 and, with
bf16, in stage 1."""
FLAT_ALIGNMENT = 2
"""The length of a flat buffer is a multiple of this times the data ranks (nccl_start_alignment_factor)."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What the replay of a stage needs to know of the planned rank."""

    config: Config
    """The configuration of the run."""
    model: nn.Module
    """The model, with its parameters on the meta device and in the dtype of the training."""
    data: Group
    """The group of the data ranks, of which the planned rank is the first."""
    trace: MemoryTrace
    """The trace of the memory, which is told what kind of memory each tensor is."""
    overlap: bool
    """Whether reductions run beside the backward pass, as on CUDA."""

    @property
    def moments(self) -> int:
        """How many numbers the optimizer keeps for each weight."""
        return 1 if self.config.optimizer.kind == "nesterov" else 2

    @property
    def groups(self) -> list[list[nn.Parameter]]:
        """The optimizer's groups: matrices and vectors, as in engine/optimizer.py."""
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() > 1]
        return [matrices, [parameter for parameter in self.model.parameters() if parameter.dim() <= 1]]

    def hold(self, elements: int, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Allocate a flat tensor of a kind of memory."""
        tensor = torch.empty(elements, dtype=dtype, device="meta")
        self.trace.mark(tensor, kind)
        return tensor

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a tensor over the data ranks."""
        if self.data.size > 1:
            dist.all_reduce(tensor, group=self.data.handle)

    def all_gather(self, whole: Tensor) -> None:
        """Fill a flat tensor from the parts of all data ranks."""
        if self.data.size > 1:
            parts = whole.view(self.data.size, -1)
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            gather(whole, parts[self.data.rank], group=self.data.handle)

    def reduce_scatter(self, whole: Tensor) -> None:
        """Sum a tensor over the data ranks and keep a part; DeepSpeed calls this on one rank too."""
        if not self.overlap:
            whole.clone()  # gloo reduces a copy
        if self.data.size > 1:
            scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            scatter(whole.view(self.data.size, -1)[self.data.rank], whole.view(-1), group=self.data.handle)


class Stage0:
    """No ZeRO: every rank holds all fp32 weights, gradients and moments; gradients are reduced at the end of a step."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.states = [
            rank.hold(p.numel(), OPTIMIZER_STATES) for group in rank.groups for p in group for _ in range(rank.moments)
        ]

    def begin_micro_step(self, last: bool) -> None:
        """Replay what happens before the forward pass.

        Args:
            last: Whether this is the last micro batch, after which the optimizer steps.
        """

    def take_gradient(self, parameter: nn.Parameter) -> None:
        """Replay what happens after autograd has put a gradient into ``parameter.grad``."""

    def end_micro_step(self, last: bool) -> None:
        """Replay what happens after the backward pass; ``last`` as for begin_micro_step."""
        if last:
            gradients = [p.grad for p in self.rank.model.parameters() if p.grad is not None]
            all_reduce_in_buckets(self.rank, gradients)

    def step(self) -> None:
        """Replay the optimizer's step."""
        for parameter in self.rank.model.parameters():
            parameter.grad = None


def all_reduce_in_buckets(rank: Rank, tensors: Sequence[Tensor]) -> None:
    """Reduce copies of the tensors, bucket by bucket (engine.py, allreduce_no_retain)."""
    for bucket in fill_buckets(tensors, ENGINE_BUCKET_ELEMENTS):
        rank.all_reduce(flatten(bucket))


def fill_buckets(tensors: Iterable[Tensor], elements: int) -> Iterator[list[Tensor]]:
    """Yield buckets of tensors; a bucket is full once it has more than ``elements`` elements."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) > elements:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


class FlatStage(Stage0):
    """One flat tensor of weights for each group, and this rank's part of the fp32 master weights and moments."""

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
        """Gather the weights after every rank has updated its part."""
        for flat in self.flat_weights:
            self.rank.all_gather(flat)


def _round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


class Stage1Bf16(FlatStage):
    """ZeRO 1 in bf16: every rank holds all gradients in fp32, and each bf16 gradient only until it is added to them."""

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank)
        self.gradients = [rank.hold(len(flat), GRADIENTS) for flat in self.flat_weights]

    def take_gradient(self, parameter: nn.Parameter) -> None:
        """Drop the bf16 gradient, which is added to the fp32 one."""
        parameter.grad = None

    def end_micro_step(self, last: bool) -> None:
        """Reduce the fp32 gradients after the last micro batch."""
        if last:
            all_reduce_in_buckets(self.rank, self.gradients)

    def step(self) -> None:
        """Gather the updated weights, and drop the gradients."""
        self.gather_weights()
        super().step()
