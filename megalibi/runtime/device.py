"""What a rank computes on: its GPU, or its share of the host's CPU cores."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

from megalibi.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from megalibi.runtime.ranks import Place


def check_accelerator(environment: Mapping[str, str]) -> None:
    """Check that torch has what DS_ACCELERATOR tells DeepSpeed to compute on; a CPU is there everywhere.

    Raises:
        ConfigError: The accelerator is not here.
    """
    import torch

    told, has = environment.get("DS_ACCELERATOR", ""), "cuda" if torch.cuda.is_available() else "cpu"
    if told not in ("", "cpu", has):
        raise ConfigError(
            f"DS_ACCELERATOR={told} in the environment: must be {has} or unset, since torch finds "
            f"{'a GPU' if has == 'cuda' else 'no GPU'} on {socket.gethostname()}"
        )


def set_up_device(place: Place) -> torch.device:
    """Return this rank's GPU, or the CPU with its share of the cores where there is no GPU or DS_ACCELERATOR=cpu.

    Raises:
        ConfigError: DS_ACCELERATOR names an accelerator that is not here.
    """
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu":  # DeepSpeed heeds it; torch sees GPUs until they are hidden
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    check_accelerator(os.environ)
    if torch.cuda.is_available():
        # A scheduler may show each rank only its own GPU.
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found no GPU
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_world_size))
    return torch.device("cpu")


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU, or of the kind of processor where torch computes on a CPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
