"""Reading the files of a checkpoint, without running what somebody may have put into them.

A file of ``torch.save`` is a pickle, and a pickle can name any function and have it called when it is loaded. Whoever
can write the file can write the manifest and its checksums to fit. So every file is loaded with ``weights_only``:
tensors, numbers, text and containers, and the few types below that DeepSpeed puts beside them.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
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
# The one line that DeepSpeed's BF16 optimizer prints whenever it is loaded.
_CHATTER = "_load_legacy_checkpoint current_rank_sd[BASE_OPTIMIZER_STATE]"

MapLocation = Callable[[Any, str], Any] | torch.device | str | None
"""The forms in which ``torch.load`` takes where tensors go."""


def open_states(path: Path, *, map_location: MapLocation = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Return what DeepSpeed saved in a file.

    Args:
        path: The file.
        map_location: Where its tensors go, in the forms that ``torch.load`` takes.
        mmap: Whether the tensors stay in the file until they are used.

    Raises:
        CheckpointError: It would run code, or is no file of torch.save.
        FileError: It may not be read.
    """
    try:
        with torch.serialization.safe_globals(_DEEPSPEED_TYPES):
            states: dict[str, Any] = torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
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


class ReadingEngine(TorchCheckpointEngine):
    """Loads for DeepSpeed, and only files that were checked before.

    Args:
        checked: The paths of the files that were checked.
    """

    def __init__(self, checked: Set[Path]) -> None:
        self._checked = checked

    def load(self, path: str, map_location: MapLocation = None) -> dict[str, Any]:
        """Return what DeepSpeed saved in a checked file."""
        if Path(path) not in self._checked:
            raise RuntimeError(f"DeepSpeed asks for {path}, which was not checked")
        return open_states(Path(path), map_location=map_location)


@contextlib.contextmanager
def reading_only(engine: DeepSpeedEngine, model_files: list[Path], checked: Set[Path]) -> Iterator[None]:
    """Let DeepSpeed load nothing but checked files.

    By itself DeepSpeed looks for files by a pattern made of their path: a ``[`` in a folder's name would hide them, and
    a copy beside them would be taken for the state of another rank.

    Args:
        engine: The engine that loads.
        model_files: The model states of each tensor rank.
        checked: The paths of all files that it may read.
    """
    original, engine.checkpoint_engine = engine.checkpoint_engine, ReadingEngine(checked)
    engine._get_all_ckpt_names = lambda load_dir, tag: [str(path) for path in model_files]
    try:
        with _without_chatter():
            yield
    finally:
        engine.checkpoint_engine = original
        del engine._get_all_ckpt_names


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        lines = printed.getvalue().splitlines(keepends=True)
        sys.stdout.writelines(line for line in lines if line.rstrip("\n") != _CHATTER)
