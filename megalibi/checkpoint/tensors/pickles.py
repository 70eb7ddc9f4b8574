"""Reading the files that DeepSpeed wrote, without running what somebody may have put into them.

A file of ``torch.save`` is a pickle, and a pickle can name any function and have it called when it is loaded. Whoever
can write the file can write the manifest and its checksums to fit. So every file is loaded with ``weights_only``:
tensors, numbers, text and containers, and the few types below that DeepSpeed puts beside them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megalibi.errors import CheckpointError, FileError, describe_os_error


def _get_stage(kind: Any, name: str) -> Any:
    """Return a ZeRO stage by its name: Python 3.11.0 to 3.11.4 pickle an enumeration's member as a call of getattr."""
    if kind is not ZeroStageEnum:
        raise ValueError("GLOBAL getattr")  # as torch says it of what it does not know
    return kind[name]


# All that DeepSpeed 0.19.8 pickles beside what torch allows, at any ZeRO stage: plain classes, whose attributes are set
# without calling anything.
_DEEPSPEED_TYPES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
_DEEPSPEED_TYPES += [(_get_stage, f"{builtins}.getattr") for builtins in ("builtins", "__builtin__")]


def open_states(path: Path) -> dict[str, Any]:
    """Return what DeepSpeed saved in a file; its tensors are on the CPU, and stay in the file until they are used.

    Args:
        path: The file.

    Raises:
        CheckpointError: It would run code, or is no file of torch.save.
        FileError: It may not be read.
    """
    try:
        with torch.serialization.safe_globals(_DEEPSPEED_TYPES):
            states: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise FileError(describe_os_error(error, path)) from error
    except Exception as error:  # a forged pickle can raise anything
        message = str(error)
        if named := re.search(r"GLOBAL (\S+)", message):
            raise CheckpointError(
                f"{path} would run code when loaded, for it names {named[1]}; it is not a checkpoint of megalibi"
            ) from error
        first_line = message.splitlines()[0] if message else "no reason given"
        raise CheckpointError(f"{path} cannot be loaded: {type(error).__name__}: {first_line}") from error
    return states
