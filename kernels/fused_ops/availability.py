"""Where the fused kernels run: on CUDA with Triton 3.3 or later; on a CPU in Triton's interpreter, if a test asks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

try:
    from fused_ops.triton_common import INTERPRETED
except ImportError as error:
    FAULT, INTERPRETED = f"Triton's kernels cannot be imported: {error}", False
else:
    FAULT = ""
"""Why there are no kernels; empty if there are."""

_LOGGER = logging.getLogger("fused_ops")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_wanted: bool | None = None


def can_fuse(x: torch.Tensor) -> bool:
    """Return whether the kernels take a tensor of this device and type. If not, the caller computes in PyTorch."""
    if x.dtype not in _DTYPES or _wanted is False:
        return False
    if x.device.type == "cuda":
        _log_fault_once()
        return not FAULT and (_wanted is True or not INTERPRETED)
    return _wanted is True and x.device.type == "cpu" and INTERPRETED


@contextmanager
def fusing(wanted: bool) -> Iterator[None]:
    """Switch the kernels for a while, for tests and comparisons: off everywhere, or on in Triton's interpreter too.

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


@cache
def _log_fault_once() -> None:
    if FAULT:
        _LOGGER.warning("cross entropy and layer norms are PyTorch's, which are slower: %s", FAULT)
