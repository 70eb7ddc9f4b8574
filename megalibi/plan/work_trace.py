"""How much a micro batch computes and moves on CUDA, by part of the model, counted on the meta device.

An operation's bytes are those of the tensors that it reads and writes, each once: what a kernel reads again from a
cache is not counted. Its part is that of the module that runs it; in the backward pass that of the module whose
forward pass made the autograd node, which remembers it. A kernel of fused_ops is one operator there, which names what
it reads and writes. A kernel of attention is counted by a formula, from its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fused_ops import CROSS_ENTROPY as CROSS_ENTROPY_KERNEL
from fused_ops import LAYER_NORM as LAYER_NORM_KERNEL
from megalibi.model import GPT
from megalibi.model.attention import SelfAttention
from megalibi.model.block import Block
from megalibi.model.layers import MLP, LayerNorm

QKV, PROJECTION, UP, DOWN, LOGITS = "qkv", "projection", "up", "down", "logits"
ATTENTION, SCORE_PRODUCTS, SCORES = "attention", "products of scores", "scores, softmax"
SPLIT, CROSS_ENTROPY, NORM, ACTIVATION = "split, rotary", "cross entropy", "layer norm", "activation"
RESIDUAL, EMBEDDING, BIASES, OTHER = "residual add", "embedding", "biases, casts", "other"
PARTS = {
    "qkv": (QKV, BIASES),
    "proj": (PROJECTION, BIASES),
    "up": (UP, BIASES),
    "down": (DOWN, BIASES),
    "output": (LOGITS, CROSS_ENTROPY),
    "attention": (OTHER, SPLIT),
    "kernel": (SCORE_PRODUCTS, SCORES),
    "norm": (OTHER, NORM),
    "mlp": (OTHER, ACTIVATION),
    "block": (OTHER, RESIDUAL),
    "model": (EMBEDDING, EMBEDDING),
    "outside": (OTHER, OTHER),
}
"""By scope: the part that its matrix products belong to, and the part that everything else belongs to."""
PRODUCTS = (QKV, PROJECTION, UP, DOWN, LOGITS, SCORE_PRODUCTS)
"""The parts that are matrix products."""

_KERNEL_PARTS = {CROSS_ENTROPY_KERNEL: CROSS_ENTROPY, LAYER_NORM_KERNEL: NORM}
"""The part that a kernel of fused_ops belongs to, by its name there."""

_aten = torch.ops.aten
_ALLOCATIONS = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
_LOOKUPS = {_aten.embedding, _aten.gather, _aten.index, _aten.index_select}
"""Operations that read as much of their first tensor as they return."""
_SCATTERS = {_aten.scatter_add_, _aten.index_add_, _aten.index_put_}
"""Operations that change as much of their first tensor as their last one holds."""
_OVERWRITES = {_aten.copy_, _aten.fill_, _aten.zero_}
"""Operations that do not read what they write."""
_SCOPE = "megalibi scope"


@dataclass
class Work:
    """What a part of the model computes and moves."""

    flops: float = 0.0
    """Floating point operations of matrix products; everything else is bound by memory."""
    bytes: float = 0.0
    """Bytes that are read and written."""


@dataclass
class WorkTrace(TorchDispatchMode):
    """Counts every operation, and adds it to a part."""

    parts: dict[str, Work] = field(default_factory=dict)
    """Work by the name of the part."""

    def __post_init__(self) -> None:
        super().__init__()
        self._scopes = ["outside"]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        result = function(*args, **(kwargs or {}))
        if function.namespace == "fused_ops":
            kernel, read, written = args
            self.add(_KERNEL_PARTS[kernel], 0.0, float(sum(map(_size, read + written))))
            return result
        flops, moved = count_operation(function, args, kwargs or {}, result)
        if moved:
            self.add(PARTS[self._scope_of(function)][0 if flops else 1], flops, moved)
        return result

    def _scope_of(self, function: Any) -> str:
        node: Any = torch._C._current_autograd_node()
        if len(self._scopes) > 1 or node is None:
            return self._scopes[-1]
        scope: str = node.metadata.get(_SCOPE, "outside")
        # The residual stream's gradient comes from two sides. Where no kernel of the norm has added them up, autograd
        # does so as soon as that of the norm is there.
        is_sum = function.overloadpacket in (_aten.add, _aten.add_)
        return "block" if scope == "norm" and is_sum else scope

    def add(self, part: str, flops: float, moved: float) -> None:
        """Add work to a part."""
        work = self.parts.setdefault(part, Work())
        work.flops += flops
        work.bytes += moved

    def enter(self, scope: str, inputs: Any) -> None:
        """Begin a scope. The autograd nodes of its inputs belong to the scope around it."""
        self._tag(inputs)
        self._scopes.append(scope)

    def leave(self, outputs: Any) -> None:
        """End the innermost scope, and note it on the autograd nodes that were made in it."""
        self._tag(outputs)
        self._scopes.pop()

    def _tag(self, tensors: Any) -> None:
        nodes: list[Any] = [leaf.grad_fn for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)]
        while nodes:
            node = nodes.pop()
            if node is not None and "AccumulateGrad" not in node.name() and _SCOPE not in node.metadata:
                node.metadata[_SCOPE] = self._scopes[-1]
                nodes += [before for before, _ in node.next_functions]


def count_operation(function: Any, args: Any, kwargs: Any, result: Any) -> tuple[float, float]:
    """Return the floating point operations and the bytes of an operation; views and allocations have none.

    Args:
        function: The operator.
        args: What it was called with.
        kwargs: What it was called with by name.
        result: What it returned.
    """
    packet = function.overloadpacket
    if function.namespace != "aten" or packet in _ALLOCATIONS:
        return 0.0, 0.0
    read, written = _tensors_in((args, kwargs)), []
    if function._schema.is_mutable:
        named = zip(function._schema.arguments, args, strict=False)
        changed = [value for argument, value in named if argument.alias_info and argument.alias_info.is_write]
        written = _tensors_in(changed)
        if packet in _OVERWRITES:
            read = [tensor for tensor in read if all(tensor is not other for other in written)]
    storages = {tensor.untyped_storage()._cdata for tensor in read + written}
    made = [tensor for tensor in _tensors_in(result) if tensor.untyped_storage()._cdata not in storages]
    if not written and not made:
        return 0.0, 0.0  # a view
    moved = sum(map(_size, read + written + made))
    if packet in _LOOKUPS:
        moved += sum(map(_size, made)) - _size(read[0])
    if packet in _SCATTERS:
        moved += 2 * (_size(read[-1]) - _size(read[0]))
    flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
    return float(flops), float(moved)


def _tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors, each once."""
    return list({id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}.values())


def _size(tensor: Tensor) -> int:
    """Return the bytes of a tensor's own elements: what is expanded counts once."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride else min(length, 1)
    return elements * tensor.element_size()


@contextmanager
def counting_by_part(trace: WorkTrace, model: GPT, *, kernel: bool) -> Iterator[None]:
    """Tell the trace, through hooks, which part of the model runs.

    Args:
        trace: What counts; it is entered inside of this context.
        model: The model, which gets hooks and loses them at the end.
        kernel: Whether attention is a fused kernel, which is counted by count_kernel.
    """
    with ExitStack() as stack:
        for module, scope in _scopes_of(model):
            before = module.register_forward_pre_hook(lambda _, inputs, scope=scope: trace.enter(scope, inputs))
            after = module.register_forward_hook(lambda _, inputs, outputs: trace.leave(outputs))
            stack.callback(before.remove)
            stack.callback(after.remove)
            if isinstance(module, SelfAttention) and scope == "attention":
                stack.callback(setattr, module, "attend", module.attend)
                module.attend = _counted(module.attend, trace, kernel)
        yield


def _scopes_of(model: GPT) -> Iterable[tuple[nn.Module, str]]:
    yield model, "model"
    yield model.output, "output"
    for module in model.modules():
        if isinstance(module, Block):
            yield module, "block"
        elif isinstance(module, LayerNorm):
            yield module, "norm"
        elif isinstance(module, SelfAttention):
            yield from ((module, "attention"), (module.qkv, "qkv"), (module.proj, "proj"))
        elif isinstance(module, MLP):
            yield from ((module, "mlp"), (module.up, "up"), (module.down, "down"))


def _counted(attend: Callable[..., Tensor], trace: WorkTrace, kernel: bool) -> Callable[..., Tensor]:
    """Return attention in a scope of its own. A kernel is counted here, and its backward pass by a hook."""

    def counted(*qkv: Tensor, **arguments: Any) -> Tensor:
        trace.enter("kernel", qkv)
        output = attend(*qkv, **arguments)
        trace.leave(output)
        if kernel and arguments["distance_bias"] is None:
            forward, backward = count_kernel(qkv[0])
            trace.add(ATTENTION, forward.flops, forward.bytes)
            if output.requires_grad:
                output.register_hook(lambda _: trace.add(ATTENTION, backward.flops, backward.bytes))
        return output

    return counted


def count_kernel(q_BSAK: Tensor) -> tuple[Work, Work]:
    """Return what a fused causal kernel does forward and backward, as many keys as queries.

    The arithmetic is two matrix products over the keys that a query sees, and five backward: the scores and their
    gradient's two factors, dq, dk and dv. A horizon leaves some out, which is not counted. Each tensor is read or
    written once: q, k, v, the output and its gradient, dq, dk, dv, and for each query and head its fp32 log-sum-exp.

    Args:
        q_BSAK: Queries [B, S, A heads, K head dimension].
    """
    batch, length, heads, head_dim = q_BSAK.shape
    product = 2.0 * batch * heads * head_dim * length * (length + 1) / 2
    tensor, rows = q_BSAK.numel() * q_BSAK.element_size(), 4 * batch * length * heads
    return Work(2 * product, 4 * tensor + rows), Work(5 * product, 8 * tensor + rows)
