"""What one rank holds at the peak of a training step, by kind: from the life of every tensor's storage.

A dispatch mode sees each storage when an operation makes it and again when it dies, on a CPU, on CUDA and on the meta
device alike, so that plans (memory.py) and measurements are made by the same accounting. What an operation holds
inside itself it does not see; on CUDA the allocator's own peak adds that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalibi.model import GPT
from megalibi.model.attention import SelfAttention

WEIGHTS, GRADIENTS, OPTIMIZER_STATES = "weights", "gradients", "optimizer_states"
ACTIVATIONS, ATTENTION_WORKSPACE, OTHER = "activations", "attention_workspace", "other"


@dataclass(frozen=True, kw_only=True)
class MemoryByKind:
    """Bytes that one rank holds when it holds most."""

    weights: int
    """Parameters as the model computes with them; under ZeRO 3 this rank's part and what is gathered at the time."""
    gradients: int
    """Gradients of the parameters, what they are accumulated in, and what the optimizer takes."""
    optimizer_states: int
    """Moments, and the fp32 master weights where they are not the parameters themselves."""
    activations: int
    """What the forward pass has made and holds for the backward pass, logits included, except attention's workspace."""
    attention_workspace: int
    """What attention holds beyond its inputs and its output: scores and weights, or the row sums of a fused kernel."""
    other: int
    """Temporaries of the backward pass (the largest are the logits' in fp32), reduction buckets, and the batch."""

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(asdict(self).values())


class MemoryTrace(TorchDispatchMode):
    """Records when storages come and go, and of which kind they are.

    A storage gets the kind of the scope it is made in, unless it is marked with another at any time of its life.

    Args:
        parameters: Parameters of the model, whose storages are weights.
    """

    def __init__(self, parameters: Iterable[nn.Parameter] = ()) -> None:
        super().__init__()
        self._parameters = {id(parameter) for parameter in parameters}
        self._scopes = [OTHER]
        self._kinds: list[str] = []  # by number of the storage, in the order of their coming
        self._sizes: list[int] = []
        self._events: list[int] = []  # the number of a storage that comes, its complement when it goes
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and register the storages of its arguments and results."""
        for tensor in _tensors_in((args, kwargs)):
            if id(tensor) in self._parameters:  # ZeRO 3 gives it another storage whenever it gathers it
                self.mark(tensor, WEIGHTS)
            else:
                self._meet(tensor, OTHER)
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors_in(result):
            self._meet(tensor, self._scopes[-1])
        return result

    def _meet(self, tensor: Tensor, kind: str) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            number = len(self._kinds)
            self._alive[key] = number
            self._kinds.append(kind)
            self._sizes.append(storage.nbytes())
            self._events.append(number)
            weakref.finalize(storage, self._part, key, number).atexit = False
        return self._alive[key]

    def _part(self, key: int, number: int) -> None:
        if self._alive.get(key) == number:
            del self._alive[key]
            self._events.append(~number)

    def mark(self, tensors: Any, kind: str) -> None:
        """Set the kind of the storages of some tensors; weights stay weights.

        Args:
            tensors: A tensor, or any nesting of containers that has some.
            kind: One of the fields of MemoryByKind.
        """
        for tensor in _tensors_in(tensors):
            number = self._meet(tensor, kind)
            if self._kinds[number] != WEIGHTS:
                self._kinds[number] = kind

    def enter(self, kind: str) -> None:
        """Begin a scope: storages that are made in it are of this kind."""
        self._scopes.append(kind)

    def leave(self, *_: Any) -> None:
        """End the innermost scope."""
        if len(self._scopes) > 1:
            self._scopes.pop()

    def peak(self) -> MemoryByKind:
        """Return what was held when most was held."""
        largest, now, at_peak = 0, 0, 0
        for place, event in enumerate(self._events):
            now += self._sizes[event] if event >= 0 else -self._sizes[~event]
            if now > largest:
                largest, at_peak = now, place + 1
        by_kind = dict.fromkeys(MemoryByKind.__dataclass_fields__, 0)
        for event in self._events[:at_peak]:
            number, sign = (event, 1) if event >= 0 else (~event, -1)
            by_kind[self._kinds[number]] += sign * self._sizes[number]
        return MemoryByKind(**by_kind)


def _tensors_in(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_sparse)


@contextmanager
def tracing_model(trace: MemoryTrace, model: GPT) -> Iterator[None]:
    """Tell the trace, through hooks, when the model is in its forward pass or in attention, and what a gradient is.

    Args:
        trace: The trace that is told.
        model: The model, which gets hooks and loses them at the end.
    """
    with ExitStack() as hooks:

        def on(register: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> None:
            hooks.callback(register(hook, **options).remove)

        def around(module: nn.Module, kind: str) -> None:
            on(module.register_forward_pre_hook, lambda *_: trace.enter(kind))
            on(module.register_forward_hook, trace.leave, always_call=True)

        for parameter in model.parameters():
            on(parameter.register_hook, partial(trace.mark, kind=GRADIENTS))
        for module in model.modules():
            if isinstance(module, SelfAttention):
                around(module, ATTENTION_WORKSPACE)
                for part in module.children():
                    around(part, ACTIVATIONS)
                _trace_attention_backward(trace, module, on)
                hooks.enter_context(_query_and_key_are_inputs(trace, module))
            elif module is model or module in list(model.blocks):  # a block is computed again in the backward pass
                around(module, ACTIVATIONS)
        yield


def _trace_attention_backward(trace: MemoryTrace, attention: SelfAttention, on: Callable[..., None]) -> None:
    """Scope the time from the gradient of attention's output to that of its input; both are no workspace."""

    def begin(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        trace.mark(inputs, ACTIVATIONS)
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda grad: trace.enter(ATTENTION_WORKSPACE))

    def leave(grad: Tensor) -> None:
        trace.leave()
        trace.mark(grad, OTHER)

    def end(module: nn.Module, inputs: tuple[Tensor, ...], qkv: Tensor) -> None:
        if qkv.requires_grad:
            qkv.register_hook(leave)

    on(attention.proj.register_forward_pre_hook, begin)
    on(attention.qkv.register_forward_hook, end)


@contextmanager
def _query_and_key_are_inputs(trace: MemoryTrace, attention: SelfAttention) -> Iterator[None]:
    """Count what a position method makes of q and k as attention's inputs, not as its workspace."""
    apply = attention.apply_to_query_key

    def applied(q_BSAK: Tensor, k_BSAK: Tensor, *, first: Sequence[int] = (0,)) -> tuple[Tensor, Tensor]:
        trace.enter(ACTIVATIONS)
        try:
            return apply(q_BSAK, k_BSAK, first=first)
        finally:
            trace.leave()

    attention.apply_to_query_key = applied
    try:
        yield
    finally:
        attention.apply_to_query_key = apply


def measure_memory(engine: Any, run_step: Callable[[], object], device: torch.device) -> MemoryByKind:
    """Take one training step and return what this rank held when it held most.

    Take at least one step before: the first step makes the optimizer states, and leaves gradients that the next one
    finds. The traced step is slow, so do not time it.

    Args:
        engine: The engine, from build_engine.
        run_step: Takes one step with all its micro batches.
        device: The device of this rank. On CUDA the peak is the allocator's, and the part of it that the trace does
            not see is counted in ``other``.
    """
    model: GPT = engine.module
    parameters = list(model.parameters())
    trace = MemoryTrace(parameters)
    mark_held(trace, engine)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    base_optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    with ExitStack() as stack:
        stack.callback(base_optimizer.register_step_pre_hook(lambda *_: mark_held(trace, engine)).remove)
        for parameter in parameters:
            hook = parameter.register_post_accumulate_grad_hook(partial(_mark_gradient, trace, engine.optimizer))
            stack.callback(hook.remove)
        stack.enter_context(tracing_model(trace, model))
        stack.enter_context(trace)
        run_step()
    mark_held(trace, engine)
    memory = trace.peak()
    if device.type != "cuda":
        return memory
    torch.cuda.synchronize(device)
    unseen = torch.cuda.max_memory_allocated(device) - memory.total
    return MemoryByKind(**{**asdict(memory), OTHER: memory.other + unseen})


def _mark_gradient(trace: MemoryTrace, optimizer: Any, parameter: nn.Parameter) -> None:
    """Mark the tensors that ZeRO 1 and 2 make of a gradient, some of which live for one micro batch only."""
    trace.mark([getattr(parameter, "grad_accum", None), getattr(optimizer, "grads_in_partition", None)], GRADIENTS)
    _mark_buckets(trace, optimizer)  # where gradients go through


def _mark_buckets(trace: MemoryTrace, optimizer: Any) -> None:
    trace.mark([bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()], OTHER)


def mark_held(trace: MemoryTrace, engine: Any) -> None:
    """Mark what an engine holds between micro batches: parameters, gradients, optimizer states."""
    parameters, optimizer = list(engine.module.parameters()), engine.optimizer
    trace.mark([parameters, [getattr(parameter, "ds_tensor", None) for parameter in parameters]], WEIGHTS)
    _mark_buckets(trace, optimizer)
    state = getattr(optimizer, "optimizer", optimizer).state
    gradients = [
        [parameter.grad for parameter in [*parameters, *state]],
        [getattr(optimizer, name, None) for name in ("averaged_gradients", "all_grad_tensors")],  # ZeRO 1, 2 and 3
        getattr(optimizer, "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition", None),
    ]
    trace.mark(gradients, GRADIENTS)
    trace.mark([list(state), list(state.values())], OPTIMIZER_STATES)
