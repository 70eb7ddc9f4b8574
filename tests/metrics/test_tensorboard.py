from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalibi.metrics.records import StepRecord, ValidationRecord
from megalibi.metrics.tensorboard import TensorBoardWriter

MakeStep = Callable[..., StepRecord]
MakeValidation = Callable[..., ValidationRecord]


def test_tensorboard_shows_what_the_resumed_run_wrote(
    tmp_path: Path, make_step: MakeStep, make_validation: MakeValidation
) -> None:
    first = TensorBoardWriter(tmp_path)
    for step in (1, 2, 3):
        first.step(make_step(step, loss=9.0))
    first.close()
    resumed = TensorBoardWriter(tmp_path, resumed_step=2)
    resumed.step(make_step(3, loss=5.0))
    resumed.validation(make_validation(3))
    resumed.close()

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 9.0), (2, 9.0), (3, 5.0)]
    assert [(event.step, event.value) for event in events.Scalars("validation/loss")] == [(3, 3.5)]
    assert "train/loss_scale" not in events.Tags()["scalars"]
