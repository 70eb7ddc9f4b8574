"""The memory that a rank uses: of its GPU, or of its process where it computes on the CPU."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch


def memory_bytes(device: torch.device | str) -> int:
    """Return the memory in use now, in bytes: by CUDA's allocator on a CUDA device, else by the process (resident set).

    Args:
        device: The device that this rank trains on.
    """
    if str(device).startswith("cuda"):
        import torch  # here, so that reading a report does not wait for torch

        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def memory_peak_bytes(device: torch.device | str) -> int:
    """Return the highest memory in use so far, in bytes; on CUDA since its peak was last reset.

    Args:
        device: The device that this rank trains on.
    """
    if str(device).startswith("cuda"):
        import torch  # here, so that reading a report does not wait for torch

        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes (getrusage(2) of each). The peak may lag the resident set by a few pages.
    return max(peak if sys.platform == "darwin" else peak * 1024, memory_bytes(device))
