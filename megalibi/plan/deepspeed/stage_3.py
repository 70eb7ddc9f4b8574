"""ZeRO 3 as DeepSpeed 0.19.8 runs it (zero/stage3.py): weights are gathered ahead of the modules that use them.

The memory depends on defaults that engine/ds_config.py does not change. Parameters of up to 100,000 elements are never
sharded, up to 50 M elements are gathered ahead, and weights that are used again within the next 1,000 M elements stay.
So every rank holds all weights of a smaller model from the forward to the backward pass.
"""

from __future__ import annotations

import math
from collections import deque
from functools import partial

import torch
from torch import Tensor, nn

from megalibi.plan.deepspeed.stage_0 import Rank, Stage0
from megalibi.plan.memory_trace import GRADIENTS, OPTIMIZER_STATES, OTHER, WEIGHTS

# DeepSpeed's defaults of zero_optimization: stage3_param_persistence_threshold, stage3_prefetch_bucket_size,
# stage3_max_live_parameters, stage3_max_reuse_distance, sub_group_size.
PERSISTENT_ELEMENTS = 100_000
PREFETCH_ELEMENTS = 50_000_000
LIVE_ELEMENTS = 1_000_000_000
REUSE_ELEMENTS = 1_000_000_000
SUB_GROUP_ELEMENTS = 1_000_000_000


class Stage3(Stage0):
    """ZeRO 3: parts of weights, gradients and states, and whole weights while they are used or gathered ahead."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.shapes = {p: p.shape for p in rank.model.parameters()}
        self.parts = {p: math.ceil(p.numel() / rank.data.size) for p in self.shapes}
        elements = sum(self.parts.values())
        self.weights = rank.hold(elements, WEIGHTS, next(iter(self.shapes)).dtype)
        self.gradients = rank.hold(elements, GRADIENTS)
        self.states = [rank.hold(elements, OPTIMIZER_STATES) for _ in range(1 + rank.moments)]
        self.buffer = torch.empty(rank.config.zero.bucket_elements, device="meta")
        self.groups = [list(group) for group in rank.groups]
        self.bucket: list[nn.Parameter] = []
        self.in_bucket = 0
        self.whole: dict[nn.Parameter, None] = {}  # an ordered set
        # Parameter -> (the buffer that it is gathered in, the parameters gathered with it), until a module needs it.
        self.gathering: dict[nn.Parameter, tuple[Tensor, list[nn.Parameter]]] = {}
        for parameter in self.shapes:
            if rank.data.size == 1:
                parameter.data = self.weights[: parameter.numel()].view(parameter.shape)
            elif parameter.numel() > PERSISTENT_ELEMENTS:
                self._release(parameter)
        self._watch()

    def _watch(self) -> None:
        """Gather weights before the forward pass of each module, in the order of modules that DeepSpeed has traced."""
        modules = [m for m in self.rank.model.modules() if next(m.parameters(recurse=False), None) is not None]
        self.forward_order = [p for module in modules for p in module.parameters(recurse=False) if self._is_cut(p)]
        self.elements_behind: dict[nn.Parameter, int] = {}
        behind = 0
        for parameter in reversed(self.forward_order):
            self.elements_behind.setdefault(parameter, behind)
            behind += self.shapes[parameter].numel()
        self.rank.model.register_forward_pre_hook(lambda *_: self._prefetch())
        for module in modules:
            cut = [p for p in module.parameters(recurse=False) if self._is_cut(p)]
            if cut:
                module.register_forward_pre_hook(partial(self._before_forward, cut))
                module.register_forward_hook(partial(self._after_forward, cut))

    def _before_forward(self, cut: list[nn.Parameter], *_: object) -> None:
        for parameter in cut:
            self._fetch(parameter)
        self._prefetch()

    def _after_forward(self, cut: list[nn.Parameter], module: nn.Module, inputs: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: self._before_forward(cut))
        if self.is_backward:  # a block is being recomputed
            return
        for parameter in cut:
            if 2 * self.elements_behind[parameter] >= REUSE_ELEMENTS:  # counted to the end of the forward pass and back
                self._release(parameter)

    def _is_cut(self, parameter: nn.Parameter) -> bool:
        return self.rank.data.size > 1 and self.shapes[parameter].numel() > PERSISTENT_ELEMENTS

    def begin_micro_step(self, last: bool) -> None:
        """Queue the weights in the order in which they are needed."""
        self.queue = deque(self.forward_order)
        self.is_backward = False

    def _fetch(self, parameter: nn.Parameter) -> None:
        if parameter not in self.gathering and parameter not in self.whole:
            self._gather([parameter])
        if parameter in self.gathering:
            _, together = self.gathering[parameter]
            for other in together:  # the first wait makes all of them whole, and the buffer lives until the last
                if other not in self.whole:
                    self._materialize(other)
            del self.gathering[parameter]
        while self.queue and self.queue[0] in self.whole:
            self.queue.popleft()

    def _prefetch(self) -> None:
        live = sum(self.shapes[p].numel() for p in {*self.whole, *self.gathering})
        room = min(LIVE_ELEMENTS - live, PREFETCH_ELEMENTS)
        ahead: dict[nn.Parameter, None] = {}
        while self.queue and sum(self.shapes[p].numel() for p in ahead) < room:
            parameter = self.queue.popleft()
            if not (parameter in self.whole or parameter in self.gathering or parameter in ahead):
                ahead[parameter] = None
        if ahead:
            self._gather(list(ahead))

    def _gather(self, parameters: list[nn.Parameter]) -> None:
        elements = sum(self.parts[p] for p in parameters) * self.rank.data.size
        buffer = self.rank.hold(elements, OTHER, self.weights.dtype)
        self.rank.all_gather(buffer)
        self.gathering |= dict.fromkeys(parameters, (buffer, parameters))

    def _materialize(self, parameter: nn.Parameter) -> None:
        parameter.data = torch.empty(self.shapes[parameter], dtype=self.weights.dtype, device="meta")
        self.rank.trace.mark(parameter, WEIGHTS)
        self.whole[parameter] = None

    def _release(self, parameter: nn.Parameter) -> None:
        parameter.data = torch.empty(0, dtype=self.weights.dtype, device="meta")
        self.whole.pop(parameter, None)

    def take_gradient(self, parameter: nn.Parameter) -> None:
        """Take a gradient into the bucket in fp32, and release the weight, which is not needed any more."""
        self.is_backward = True
        elements = self.shapes[parameter].numel()
        if self.in_bucket and self.in_bucket + elements > len(self.buffer):
            self._reduce_bucket()
        if self.in_bucket + elements <= len(self.buffer):
            parameter.grad = None
            self.bucket.append(parameter)
            self.in_bucket += elements
        else:
            self._reduce([parameter], parameter.grad)
        if self._is_cut(parameter):
            self._release(parameter)

    def _reduce_bucket(self) -> None:
        if self.bucket:
            self._reduce(self.bucket, None)
        self.bucket, self.in_bucket = [], 0

    def _reduce(self, parameters: list[nn.Parameter], large: Tensor | None) -> None:
        elements = sum(self.parts[p] for p in parameters) * self.rank.data.size
        cast = self.buffer[:elements] if large is None else large.to(torch.float32)
        needs_copy = len(parameters) > 1 or elements != self.shapes[parameters[0]].numel()  # to interleave or to pad
        together = torch.empty(elements, device="meta") if needs_copy else cast
        self.rank.reduce_scatter(together)
        for parameter in parameters:
            parameter.grad = None

    def end_micro_step(self, last: bool) -> None:
        """Reduce what is left in the bucket, and release the weights that are still whole."""
        self._reduce_bucket()
        for parameter in list(self.whole):
            self._release(parameter)
        self.gathering.clear()

    def step(self) -> None:
        """Release whole weights, take the norm in fp64, copy gradients flat, update, and gather small weights again."""
        small = [p for p in self.shapes if self.rank.data.size > 1 and not self._is_cut(p)]
        for parameter in small:
            self._release(parameter)
        torch.empty(max(self.parts.values()), dtype=torch.float64, device="meta")
        for group in self.groups:
            for sub_group in _fill_parts([self.parts[p] for p in group]):
                self.rank.hold(sub_group, GRADIENTS)
        for parameter in small:
            self._materialize(parameter)
            del self.whole[parameter]
            whole = torch.empty(self.parts[parameter] * self.rank.data.size, dtype=self.weights.dtype, device="meta")
            self.rank.all_gather(whole)


def _fill_parts(sizes: list[int]) -> list[int]:
    """Return the number of elements of each sub-group."""
    totals = [0]
    for size in sizes:
        if totals[-1] >= SUB_GROUP_ELEMENTS:
            totals.append(0)
        totals[-1] += size
    return totals
