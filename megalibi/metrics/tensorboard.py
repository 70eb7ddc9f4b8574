"""The records of a run as TensorBoard's scalars."""

from __future__ import annotations

import threading
from pathlib import Path

from megalibi.metrics.records import RollbackRecord, StepRecord, ValidationRecord

TENSORBOARD_FOLDER = "tensorboard"
"""Folder of the event files inside a run's folder."""


class TensorBoardWriter:
    """Writes scalars by step for TensorBoard.

    Args:
        folder: Folder of the event files.
        resumed_step: The step the run resumes from; TensorBoard hides what an earlier process wrote for later steps.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path | str, *, resumed_step: int = 0) -> None:
        from torch.utils.tensorboard import (
            SummaryWriter,
        )  # imported here, because it takes seconds and one rank needs it

        _silence_its_thread()
        self._open = lambda step: SummaryWriter(str(folder), purge_step=step + 1)
        self._events = self._open(resumed_step)

    def step(self, record: StepRecord) -> None:
        """Write the scalars of one step."""
        scalars = {
            "train/loss": record.loss,
            "train/grad_norm": record.grad_norm,
            "train/learning_rate": record.learning_rate,
            "train/loss_scale": record.loss_scale,
            "speed/step_seconds": record.step_seconds,
            "speed/tokens_per_second": record.tokens_per_second,
            "speed/model_tflops_per_second": record.model_tflops_per_second,
            "speed/model_tflops_per_second_causal": record.model_tflops_per_second_causal,
            "speed/straggler_ratio": record.straggler_ratio,
            "memory/bytes": record.memory_bytes,
            "memory/peak_bytes": record.memory_peak_bytes,
        }
        for tag, value in scalars.items():
            if value is not None:
                self._events.add_scalar(tag, value, record.step)

    def validation(self, record: ValidationRecord) -> None:
        """Write the scalars of one validation."""
        self._events.add_scalar("validation/loss", record.validation_loss, record.step)
        self._events.add_scalar("validation/perplexity", record.validation_perplexity, record.step)

    def go_back(self, record: RollbackRecord) -> None:
        """Begin another event file, which takes back the scalars of later steps."""
        self._events.close()
        self._events = self._open(record.step)

    def sync(self) -> None:
        """Write what is buffered to the event file."""
        self._events.flush()

    def close(self) -> None:
        """Write what is buffered and close the event file."""
        self._events.close()


def _silence_its_thread() -> None:
    """Keep the traceback of TensorBoard's thread off the terminal, because the next call raises the same error."""
    say = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            say(failed)

    threading.excepthook = hook
