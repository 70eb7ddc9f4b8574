from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megalibi.errors import FileError
from megalibi.metrics.jsonl import DROPPED_FILE, JsonlWriter
from megalibi.metrics.records import RollbackRecord, StepRecord, ValidationRecord, read_last_losses, read_metrics
from megalibi.metrics.writers import Writers
from tests.support.jobs import CONTEXT

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
    with CONTEXT.Pool(1) as pool, pytest.raises(FileError, match=r"the last 3 lines of .* could not be written"):
        pool.apply(write_to_a_full_disk, (str(tmp_path), 3, 0))


def test_a_rollback_takes_back_lines_that_are_written_and_lines_that_are_not(
    tmp_path: Path, make_step: MakeStep, make_validation: MakeValidation
) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for record in (make_step(1), make_step(2)):
        writer.step(record)
    writer.validation(make_validation(2))
    writer.step(make_step(3))
    writer._unwritten = bytearray(f"{make_step(4).to_json()}\n".encode())  # as after a full disk
    rollback = RollbackRecord(step=2, rolled_back_from=4, spike_loss=9.5, left_out="8-15")
    writer.go_back(rollback)
    writer.step(make_step(3, loss=5.0))
    writer.close()
    metrics = read_metrics(tmp_path)
    assert metrics.steps == (make_step(1), make_step(2), make_step(3, loss=5.0))
    assert metrics.validations == (make_validation(2),)
    assert metrics.rollbacks == (rollback,)
    assert len((tmp_path / DROPPED_FILE).read_text().splitlines()) == 2
    assert read_last_losses(tmp_path, 2) == [(2, make_step(2).loss), (3, 5.0)]
    assert read_last_losses(tmp_path / "nowhere", 2) == []
