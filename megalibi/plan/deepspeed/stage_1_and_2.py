"""ZeRO 2, and ZeRO 1 in fp32 and fp16, as DeepSpeed 0.19.8 runs them (zero/stage_1_and_2.py).

Gradients pass through a bucket, and each rank keeps its part of their sum. With 16-bit weights it keeps a flat fp32
tensor; with fp32 weights it keeps the gradients themselves, moved into a tensor of their own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors as flatten

from megalibi.plan.deepspeed.stage_0 import FlatStage, Rank, fill_buckets
from megalibi.plan.memory_trace import GRADIENTS


class Stage1Or2(FlatStage):
    """ZeRO 1 and 2: gradients pass through a bucket, and this rank keeps its part of their sum."""

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank)
        self.is_stage_2 = rank.config.zero.stage == 2
        self.dtype = self.flat_weights[0].dtype
        self.is_low = self.dtype != torch.float32
        self.bucket_elements = rank.config.zero.bucket_elements
        self.buffers: list[Tensor] = []
        self.bucket: list[nn.Parameter] = []
        self.in_bucket = 0
        self.is_last = False
        self.accumulated: dict[nn.Parameter, Tensor] = {}  # stage 1, 16-bit weights: fp32 sums over micro batches
        self.owned: dict[int, Tensor] = {}  # with 16-bit weights: this rank's part of the sum, by group
        self.kept: list[Tensor] = []  # with fp32 weights: the gradients of this rank's part
        self.arena: Tensor | None = None
        self._locate()

    def _locate(self) -> None:
        """Find out which ranks own which parameters: a parameter may lie across the parts of several ranks."""
        self.group_of: dict[nn.Parameter, int] = {}
        self.owners: dict[nn.Parameter, list[int]] = {}
        for number, (group, flat) in enumerate(zip(self.rank.groups, self.flat_weights, strict=True)):
            part, start = len(flat) // self.rank.data.size, 0
            for parameter in group:
                stop = start + parameter.numel()
                self.group_of[parameter] = number
                self.owners[parameter] = list(range(start // part, (stop - 1) // part + 1))
                start = stop

    def _is_owned(self, parameter: nn.Parameter) -> bool:
        return self.rank.data.rank in self.owners[parameter]

    def begin_micro_step(self, last: bool) -> None:
        """Remember whether this is the last micro batch of the step."""
        self.is_last = last

    def take_gradient(self, parameter: nn.Parameter) -> None:
        """Take a gradient into the bucket (stage 2), or into the sum over micro batches (stage 1)."""
        if not self.buffers:
            dtype = torch.float32 if self.is_low and not self.is_stage_2 else self.dtype
            for _ in range(2 if self.rank.overlap else 1):
                self.buffers.append(torch.empty(self.bucket_elements, dtype=dtype, device="meta"))
        if self.is_low and not self.is_stage_2:
            assert parameter.grad is not None
            cast = parameter.grad.to(torch.float32)
            self.accumulated.setdefault(parameter, cast)
            self.rank.trace.mark(self.accumulated[parameter], GRADIENTS)
            parameter.grad = None
        if self.is_stage_2 or (self.rank.overlap and self.is_last):
            self._put_in_bucket(parameter)

    def _put_in_bucket(self, parameter: nn.Parameter) -> None:
        elements = parameter.numel()
        if self.in_bucket + elements > self.bucket_elements:
            self._reduce_bucket()
        if elements <= self.bucket_elements:
            view = self.buffers[0][self.in_bucket : self.in_bucket + elements].view(parameter.shape)
            if parameter in self.accumulated:
                self.accumulated[parameter] = view
            else:
                parameter.grad = None
                parameter.grad = view
        self.bucket.append(parameter)
        self.in_bucket += elements

    def _reduce_bucket(self) -> None:
        if not self.bucket:
            return
        slices = self._slices()
        for small in fill_buckets(slices, self.bucket_elements):
            flat = flatten(small)
            self.rank.all_reduce(flat.to(torch.float32))
            del flat
        for parameter in self.bucket:
            self._let_go(parameter)
        self.bucket, self.in_bucket = [], 0

    def _let_go(self, parameter: nn.Parameter) -> None:
        """Drop a reduced gradient, or keep it if this rank owns it and has no flat tensor for it."""
        if self._is_owned(parameter) and self.is_low:
            self.accumulated.pop(parameter, None)
        elif self._is_owned(parameter):
            self._keep(parameter)
        elif self.is_stage_2:
            parameter.grad = None

    def _slices(self) -> list[Tensor]:
        """Cut the bucket as average_tensor does: one slice for each run of gradients with the same owner."""
        parts: list[tuple[int, bool]] = []  # (owner, whether the slice goes straight into this rank's part)
        sizes: list[int] = []
        for parameter in self.bucket:
            owners = self.owners[parameter]
            for owner in owners:  # memory depends on whether a parameter is split, not on where
                direct = self.is_low and owner == self.rank.data.rank
                if direct and self.group_of[parameter] not in self.owned:
                    number = self.group_of[parameter]
                    part = len(self.flat_weights[number]) // self.rank.data.size
                    self.owned[number] = self.rank.hold(part, GRADIENTS)
                if parts and not direct and parts[-1] == (owner, False):
                    sizes[-1] += parameter.numel() // len(owners)
                else:
                    parts.append((owner, direct))
                    sizes.append(parameter.numel() // len(owners))
        sizes[-1] += self.in_bucket - sum(sizes)
        if self.in_bucket > self.bucket_elements:
            whole = self.accumulated.get(self.bucket[0], self.bucket[0].grad)
            assert whole is not None
            return list(whole.view(-1).split(sizes))
        return list(self.buffers[0][: self.in_bucket].split(sizes))

    def _keep(self, parameter: nn.Parameter) -> None:
        if self.arena is None:
            self.arena = self.rank.hold(sum(p.numel() for p in self.owners if self._is_owned(p)), GRADIENTS, self.dtype)
        parameter.grad = None
        parameter.grad = self.arena[: parameter.numel()].view(parameter.shape)

    def end_micro_step(self, last: bool) -> None:
        """Reduce what is left in the bucket; with fp32 weights the first micro batch's gradients stay."""
        if not self.is_stage_2:
            if not last:
                return
            if not self.rank.overlap:
                for group in self.rank.groups:
                    for parameter in group:
                        self._put_in_bucket(parameter)
        self._reduce_bucket()
        if self.arena is not None and not self.kept:
            self.kept = [self.arena]
        self.arena = None
        self.buffers = []
        for parameter in self.rank.model.parameters():
            parameter.grad = None

    def step(self) -> None:
        """Take the norm in fp64, copy gradients that are not flat yet, update, and gather the weights."""
        for parameter, owners in self.owners.items():
            if self._is_owned(parameter):
                torch.empty(math.ceil(parameter.numel() / len(owners)), dtype=torch.float64, device="meta")
        for number, flat in enumerate(self.flat_weights):
            if not self.is_low:
                gradient = self.rank.hold(len(flat) // self.rank.data.size, GRADIENTS)
                if number == len(self.flat_weights) - 1:
                    self.kept = []
                del gradient
            self.owned.pop(number, None)
        self.accumulated.clear()
        self.gather_weights()
