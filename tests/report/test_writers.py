from __future__ import annotations

import dataclasses
import io
import json
import logging
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalibi.config import ConfigError
from megalibi.report.metrics import StepRecord, ValidationRecord, read_metrics
from megalibi.report.writers import DROPPED_FILE, ConsoleWriter, JsonlWriter, TensorBoardWriter, Writers, build_writers
from tests.launch.jobs import CONTEXT

MakeStep = Callable[..., StepRecord]
MakeValidation = Callable[..., ValidationRecord]


def test_each_line_is_on_disk_before_the_next_step(tmp_path: Path, make_step: MakeStep) -> None:
    writer = JsonlWriter(tmp_path / "run" / "metrics.jsonl")
    for step in (1, 2):
        writer.step(make_step(step))
        assert read_metrics(tmp_path / "run").steps[-1] == make_step(step)
    writer.close()


def test_going_back_leaves_each_step_once_and_loses_no_line(
    tmp_path: Path, make_step: MakeStep, make_validation: MakeValidation
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [make_step(1), make_step(2), make_validation(2), make_step(3), make_validation(3)]
    torn = make_step(4).to_json()[:30]
    whole = [f"{record.to_json()}\n" for record in lines]
    unreadable = "one line that nobody can read\n"
    path.write_text("".join([whole[0], unreadable, *whole[1:], torn]))
    writer = JsonlWriter(path)
    assert writer.set_aside_after(2) == 4
    writer.step(make_step(3, loss=5.0))
    writer.close()
    expected = [make_step(1), make_step(2), make_validation(2), make_step(3, loss=5.0)]
    assert path.read_text() == "".join(f"{record.to_json()}\n" for record in expected)
    dropped = tmp_path / DROPPED_FILE
    assert dropped.read_text() == "".join([unreadable, *whole[3:], f"{torn}\n"])
    assert sorted(tmp_path.iterdir()) == [dropped, path]

    writer = JsonlWriter(path)
    assert writer.set_aside_after(0) == 4  # as where checkpoints/ is gone; the lines before it are still there
    writer.close()
    assert path.read_text() == ""
    assert dropped.read_text().endswith("".join(f"{record.to_json()}\n" for record in expected))
    assert len(dropped.read_text().splitlines()) == 8


def test_a_last_line_that_lacks_only_its_newline_is_torn(tmp_path: Path, make_step: MakeStep) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{make_step(1).to_json()}\n{make_step(2).to_json()}")
    writer = JsonlWriter(path)
    assert writer.set_aside_after(2) == 1
    writer.close()
    assert path.read_text() == f"{make_step(1).to_json()}\n"


def test_a_rewrite_that_fails_leaves_the_old_file(tmp_path: Path, make_step: MakeStep) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.step(make_step(1))
    writer.step(make_step(2))
    (tmp_path / "metrics.jsonl.tmp").mkdir()  # so the file aside cannot be opened
    with pytest.raises(IsADirectoryError):
        writer.set_aside_after(1)
    assert read_metrics(tmp_path).steps == (make_step(1), make_step(2))


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


def write_to_a_full_disk(folder: str, last_step: int, bytes_until_step_4: int) -> None:
    """Write records where files may not grow past a size, which the system lets the process raise before step 4."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_until_step_4, most))
    fields = dict.fromkeys(StepRecord.__dataclass_fields__, 1)
    writers = Writers([JsonlWriter(Path(folder) / "metrics.jsonl")])
    with writers:
        for step in range(1, last_step + 1):
            if step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            writers.step(StepRecord(**(fields | {"step": step})))
            writers.sync()


@pytest.mark.parametrize("num_bytes", [0, 500])  # at a line's end, and within one
def test_lines_that_a_full_disk_does_not_take_are_written_when_it_does(tmp_path: Path, num_bytes: int) -> None:
    process = CONTEXT.Process(target=write_to_a_full_disk, args=(str(tmp_path), 5, num_bytes))
    process.start()
    process.join()
    assert process.exitcode == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_lines_that_no_disk_took_are_said_at_the_end(tmp_path: Path) -> None:
    with CONTEXT.Pool(1) as pool, pytest.raises(ConfigError, match=r"the last 3 lines of .* could not be written"):
        pool.apply(write_to_a_full_disk, (str(tmp_path), 3, 0))


def test_an_error_in_the_loop_closes_every_writer(tmp_path: Path, make_step: MakeStep) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(RuntimeError, match="loop"), Writers([writer]):
        raise RuntimeError("loop")
    with pytest.raises(ValueError, match="closed"):
        writer.step(make_step(1))
