from __future__ import annotations

import dataclasses
import io
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalibi.metrics.jsonl import JsonlWriter
from megalibi.metrics.records import StepRecord, ValidationRecord, read_metrics
from megalibi.metrics.writers import ConsoleWriter, TensorBoardWriter, Writers, build_writers

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


def console_to(text: io.StringIO, *, terminal: bool) -> Console:
    return Console(file=text, force_terminal=terminal, width=100, highlight=False)


def test_plain_lines_come_every_few_steps_and_at_both_ends(
    make_step: MakeStep, make_validation: MakeValidation
) -> None:
    text = io.StringIO()
    writer = ConsoleWriter(total_steps=18, log_every_steps=5, resumed_step=7, console=console_to(text, terminal=False))
    for step in range(8, 19):
        writer.step(make_step(step, loss=3.45123, grad_norm=0.8123, tokens_per_second=12_345.0, step_seconds=19.0))
    writer.validation(make_validation(18))
    writer.close()
    lines = text.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "step 8/18",
        "step 10/18",
        "step 15/18",
        "step 18/18",
        "step 18/18",
    ]
    assert lines[0] == (
        "step 8/18 | loss 3.4512 | grad norm 0.812 | lr 3.00e-04 | 12.3k tokens/s | 0.21 TFLOP/s | 1.2 GB | 3m10s left"
    )
    assert lines[-1] == "step 18/18 | validation loss 3.5000 | perplexity 33.12 | 4.1k tokens | 2s"


def test_plain_lines_say_the_loss_scale_and_a_skipped_step(make_step: MakeStep) -> None:
    text = io.StringIO()
    writer = ConsoleWriter(total_steps=2, log_every_steps=1, console=console_to(text, terminal=False))
    writer.step(make_step(1, loss_scale=65536.0, skipped=True))
    assert text.getvalue().startswith("step 1/2 | skipped | loss 7.0000 | grad norm 0.800 | ")
    assert " | loss scale 65536 | " in text.getvalue()


def test_a_validation_that_read_fewer_samples_than_it_should_says_so(make_validation: MakeValidation) -> None:
    for samples, end in ((None, "2s"), (15, "15 samples, all of data.valid: train.eval_samples=16"), (16, "2s")):
        text = io.StringIO()
        console = console_to(text, terminal=False)
        writer = ConsoleWriter(total_steps=18, log_every_steps=1, eval_samples=16, console=console)
        writer.validation(dataclasses.replace(make_validation(18), validation_samples=samples))
        assert text.getvalue().rstrip().split(" | ")[-1] == end


def test_a_terminal_gets_a_bar_with_validations_above_it(make_step: MakeStep, make_validation: MakeValidation) -> None:
    text = io.StringIO()
    writer = ConsoleWriter(total_steps=2, log_every_steps=1, console=console_to(text, terminal=True))
    writer.step(make_step(1))
    writer.validation(make_validation(1))
    writer.step(make_step(2))
    writer.close()
    shown = text.getvalue()
    assert "━" in shown
    assert "validation loss 3.5000" in shown
    assert "2/2 | loss 5.0000 | 1.0k tokens/s | 0s left" in shown
    assert "\x1b[?25h" in shown  # the cursor is back


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
