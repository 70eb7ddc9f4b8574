"""Where the fused kernels run.

On CUDA with Triton 3.3 or later; on a CPU in Triton's interpreter, if a test asks for it; and on the meta device, if a
plan asks for it: there they allocate what they allocate on CUDA, and compute nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch.library import Library

try:
    from fused_ops.triton_common import INTERPRETED
except ImportError as error:
    FAULT, INTERPRETED = f"Triton's kernels cannot be imported: {error}", False
else:
    FAULT = ""
"""Why there are no kernels; empty if there are."""

CROSS_ENTROPY, LAYER_NORM = "cross entropy", "layer norm"
"""The names by which ``fusing_on_meta`` and ``note_launch`` know the kernels."""

# An operator without a result, which whoever traces operators sees: a launch on the meta device, in what it reads and
# writes. It is defined for that device alone.
_library = Library("fused_ops", "DEF")
_library.define("launch(str kernel, Tensor[] read, Tensor(a!)[] written) -> ()")
_library.impl("launch", lambda kernel, read, written: None, "Meta")

_LOGGER = logging.getLogger("fused_ops")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_wanted: bool | None = None
_fused_on_meta: frozenset[str] = frozenset()


def can_fuse(x: torch.Tensor, kernel: str = CROSS_ENTROPY) -> bool:
    """Return whether a kernel takes a tensor of this device and type. If not, the caller computes in PyTorch.

    Args:
        x: Any shape.
        kernel: CROSS_ENTROPY or LAYER_NORM; it matters on the meta device alone.
    """
    if x.dtype not in _DTYPES or _wanted is False:
        return False
    if x.device.type == "meta":
        return kernel in _fused_on_meta
    if x.device.type == "cuda":
        _log_fault_once()
        return not FAULT and (_wanted is True or not INTERPRETED)
    return _wanted is True and x.device.type == "cpu" and INTERPRETED


@contextmanager
def fusing(wanted: bool) -> Iterator[None]:
    """Switch the kernels for a while, for tests and comparisons: off everywhere, or on in Triton's interpreter too.

    Args:
        wanted: Whether they shall run.

    Raises:
        RuntimeError: They are wanted and cannot run.
    """
    global _wanted
    if wanted and (FAULT or not (INTERPRETED or torch.cuda.is_available())):
        raise RuntimeError(FAULT or "no GPU is found, and TRITON_INTERPRET=1 was not set when Triton was imported")
    before, _wanted = _wanted, wanted
    try:
        yield
    finally:
        _wanted = before


@contextmanager
def fusing_on_meta(*kernels: str) -> Iterator[None]:
    """Let kernels take tensors of the meta device for a while, to plan what they hold and move on CUDA.

    They need no Triton there. Each launch is seen by a ``TorchDispatchMode`` as the operator ``fused_ops::launch``.

    Args:
        kernels: CROSS_ENTROPY, LAYER_NORM, both or none.
    """
    global _fused_on_meta
    before, _fused_on_meta = _fused_on_meta, frozenset(kernels)
    try:
        yield
    finally:
        _fused_on_meta = before


def note_launch(kernel: str, read: Sequence[torch.Tensor | None], written: Sequence[torch.Tensor | None]) -> None:
    """Let whoever traces operators see what a kernel would read and write, on the meta device.

    Args:
        kernel: CROSS_ENTROPY or LAYER_NORM.
        read: The tensors that it reads; those that are None it does not have.
        written: The tensors that it writes, likewise.
    """
    read, written = ([x for x in tensors if x is not None] for tensors in (read, written))
    torch.ops.fused_ops.launch(kernel, read, written)


@cache
def _log_fault_once() -> None:
    if FAULT:
        _LOGGER.warning("cross entropy and layer norms are PyTorch's, which are slower: %s", FAULT)
