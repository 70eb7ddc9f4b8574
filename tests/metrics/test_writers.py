from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from megalibi.metrics.jsonl import JsonlWriter
from megalibi.metrics.records import StepRecord, ValidationRecord, read_metrics
from megalibi.metrics.writers import Writers, build_writers

MakeStep = Callable[..., StepRecord]
MakeValidation = Callable[..., ValidationRecord]


def test_rank_zero_writes_and_the_others_do_not(
    tmp_path: Path, make_step: MakeStep, make_validation: MakeValidation
) -> None:
    for rank in (1, 0):
        folder = tmp_path / str(rank)
        with build_writers(folder, rank=rank, total_steps=1, log_every_steps=1) as writers:
            writers.step(make_step(1))
            writers.validation(make_validation(1))
        assert folder.exists() == (rank == 0)
    assert read_metrics(tmp_path / "0").steps == (make_step(1),)
    assert list((tmp_path / "0" / "tensorboard").iterdir())


def test_resuming_drops_what_an_earlier_process_wrote_beyond_the_checkpoint(
    tmp_path: Path, make_step: MakeStep
) -> None:
    for resumed_step, last in ((0, 4), (2, 3)):
        with build_writers(tmp_path, rank=0, total_steps=9, log_every_steps=9, resumed_step=resumed_step) as writers:
            for step in range(resumed_step + 1, last + 1):
                writers.step(make_step(step))
    assert [record.step for record in read_metrics(tmp_path).steps] == [1, 2, 3]


def test_a_tensorboard_whose_folder_is_gone_is_left_out_with_one_warning(
    tmp_path: Path, make_step: MakeStep, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megalibi"), "propagate", True)  # other tests configure it not to
    tracebacks: list[object] = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    with build_writers(tmp_path, rank=0, total_steps=9, log_every_steps=9) as writers:
        writers.step(make_step(1))
        writers.sync()  # or TensorBoard's thread makes its file while the folder goes
        shutil.rmtree(tmp_path / "tensorboard")
        for step in range(2, 8):
            writers.step(make_step(step))
            writers.sync()
    assert not tracebacks
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("TensorBoard failed and is left out from here on, training goes on: ")
    assert "No such file or directory" in message
    assert [record.step for record in read_metrics(tmp_path).steps] == list(range(1, 8))


def test_a_tensorboard_that_cannot_begin_is_left_out(
    tmp_path: Path, make_step: MakeStep, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megalibi"), "propagate", True)
    (tmp_path / "tensorboard").write_text("no folder")
    with build_writers(tmp_path, rank=0, total_steps=9, log_every_steps=9) as writers:
        writers.step(make_step(1))
    assert "TensorBoard failed and is left out from here on" in caplog.text
    assert read_metrics(tmp_path).steps == (make_step(1),)


def test_an_error_in_the_loop_closes_every_writer(tmp_path: Path, make_step: MakeStep) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(RuntimeError, match="loop"), Writers([writer]):
        raise RuntimeError("loop")
    with pytest.raises(ValueError, match="closed"):
        writer.step(make_step(1))
