"""What a rank sends: a log of collectives, and groups whose collectives do nothing but appear in the log."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalibi.parallel import ALONE, Group

_OPERATIONS = {
    "allreduce_": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
}


@dataclass(frozen=True)
class Collective:
    """One collective that the planned rank takes part in."""

    group: str
    """The group of ranks: tensor or data."""
    operation: str
    """The operation: all-reduce, all-gather or reduce-scatter."""
    size_bytes: int
    """Bytes of the whole tensor, before it is scattered or after it is gathered."""
    ranks: int
    """The number of ranks in the group."""

    @property
    def sent_bytes(self) -> int:
        """Bytes that a rank sends by a ring algorithm: (n - 1) / n of the tensor, and twice that for an all-reduce."""
        rounds = 2 if self.operation == "all-reduce" else 1
        return rounds * self.size_bytes * (self.ranks - 1) // self.ranks


class CollectiveLog(TorchDispatchMode):
    """Logs the collectives of some groups.

    Args:
        groups: The groups whose collectives are logged, by name.
    """

    def __init__(self, **groups: Group) -> None:
        super().__init__()
        self._groups = {name: group for name, group in groups.items() if group.size > 1}
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the collective and run it."""
        if function.namespace == "c10d":
            self._note(function._schema.name.removeprefix("c10d::"), args)
        return function(*args, **(kwargs or {}))

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        objects = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
        handles = [dist.ProcessGroup.unbox(arg) for arg in objects]
        tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        for group_name, group in self._groups.items():
            if name in _OPERATIONS and any(handle == group.handle for handle in handles):
                size = max(t.numel() * t.element_size() for t in tensors)
                self.collectives.append(Collective(group_name, _OPERATIONS[name], size, group.size))


def make_group(size: int) -> Group:
    """Return a group as its first rank sees it, whose collectives take no time and no memory."""
    if size == 1:
        return ALONE
    from torch._C._distributed_c10d import FakeProcessGroup

    create = getattr(FakeProcessGroup, "_create_internal", FakeProcessGroup)
    handle = dist.ProcessGroup(dist.HashStore(), 0, size)
    kind = dist.ProcessGroup.BackendType.CUSTOM
    for device in ("cpu", "meta"):
        handle._register_backend(torch.device(device), kind, create(0, size))
    handle._set_default_backend(kind)
    return Group(rank=0, size=size, ranks=tuple(range(size)), handle=handle)


def sum_sent_bytes(collectives: Iterable[Collective]) -> dict[str, int]:
    """Return the bytes that a rank sends, by group and operation as in "tensor all-reduce"."""
    totals: dict[str, int] = {}
    for collective in collectives:
        kind = f"{collective.group} {collective.operation}"
        totals[kind] = totals.get(kind, 0) + collective.sent_bytes
    return totals
