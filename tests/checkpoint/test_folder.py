from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from megalibi.checkpoint.folder import discard, find_checkpoint, list_checkpoints
from megalibi.checkpoint.manifest import read_manifest
from megalibi.errors import CheckpointError
from tests.support.checkpoints import assert_whole, save_files
from tests.support.jobs import CONTEXT

KILLS = 12


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_latest_of_several_checkpoints_is_found_whole(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "none") is None
    assert list_checkpoints(tmp_path / "none") == []
    save_files(tmp_path, 9)
    final = save_files(tmp_path, 10)
    assert find_checkpoint(tmp_path) == final == tmp_path / "step_00000010"
    assert assert_whole(final) == 10
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000009", "step_00000010"]


def test_without_latest_the_newest_step_is_found_by_number(tmp_path: Path) -> None:
    for step in (10**8, 99_999_999):
        save_files(tmp_path, step)
    (tmp_path / "latest").unlink()
    assert find_checkpoint(tmp_path) == tmp_path / "step_100000000"


def test_a_latest_that_names_nothing_is_an_error_that_names_the_newest(tmp_path: Path) -> None:
    save_files(tmp_path, 1)
    shutil.rmtree(save_files(tmp_path, 2))
    with pytest.raises(CheckpointError, match=r"latest names 'step_00000002', .* the newest one is step_00000001"):
        find_checkpoint(tmp_path)


def test_latest_may_be_a_link_to_a_checkpoint_and_to_nothing_else(tmp_path: Path) -> None:
    for step in (1, 2):
        save_files(tmp_path / "checkpoints", step)
    folder = tmp_path / "checkpoints"
    latest = folder / "latest"
    for target in ("step_00000001", str(folder / "step_00000001")):
        latest.unlink()
        latest.symlink_to(target)
        assert find_checkpoint(folder) == folder / "step_00000001"
    save_files(folder, 3)
    assert not latest.is_symlink()
    assert find_checkpoint(folder) == folder / "step_00000003"
    save_files(tmp_path / "other", 1)
    for target in (str(tmp_path / "other" / "step_00000001"), "step_00000009", "latest"):
        latest.unlink()
        latest.symlink_to(target)
        with pytest.raises(
            CheckpointError, match=r"latest names '.*', which is no complete checkpoint; the newest one is"
        ):
            find_checkpoint(folder)
    latest.unlink()
    latest.mkdir()
    with pytest.raises(
        CheckpointError, match=r"latest is a folder: must be a file with the name of a checkpoint, or a link"
    ):
        find_checkpoint(folder)


def test_folders_without_a_manifest_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "step_00000007").mkdir()
    (tmp_path / "step_00000008.partial").mkdir()
    assert find_checkpoint(tmp_path) is None
    with pytest.raises(
        CheckpointError, match=r"step_00000007 is no complete checkpoint: .*manifest\.json: No such file"
    ):
        read_manifest(tmp_path / "step_00000007")


@pytest.mark.parametrize(("keep", "kept"), [(0, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_prune_keeps_the_newest(tmp_path: Path, keep: int, kept: list[int]) -> None:
    for step in (1, 2, 3, 4):
        save_files(tmp_path, step, keep=keep)
    assert [assert_whole(path) for path in list_checkpoints(tmp_path)] == kept


def test_prune_never_deletes_what_latest_names(tmp_path: Path) -> None:
    save_files(tmp_path, 20)
    save_files(tmp_path, 30)
    save_files(tmp_path, 12, keep=1)  # the run went back to step 10
    assert names(tmp_path) == ["latest", "step_00000012"]


def test_prune_deletes_what_crashes_left(tmp_path: Path) -> None:
    for leftover in ("step_00000001.partial", "step_00000002.discarded"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "file").write_text("x")
    (tmp_path / "latest.tmp").write_text("x")
    save_files(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step_00000003"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_files(tmp_path, 5, "first")
    final = save_files(tmp_path, 5, "second")
    assert (final / "a.pt").read_text() == "a.pt of step 5 second"
    assert assert_whole(find_checkpoint(tmp_path)) == 5
    assert names(tmp_path) == ["latest", "step_00000005"]


def test_a_discarded_checkpoint_is_gone(tmp_path: Path) -> None:
    discard(save_files(tmp_path, 5))
    assert list_checkpoints(tmp_path) == []


class Crash(BaseException):
    """The process ends here."""


class CrashPoint:
    """Raises Crash instead of the n-th change of the file system: what a process does after it is killed."""

    CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")

    def __init__(self) -> None:
        self.changes_left: int | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, _args: tuple[Any, ...]) -> None:
        if self.changes_left is not None and event in self.CHANGES:
            self.changes_left -= 1
            if self.changes_left < 0:
                raise Crash

    def run(self, fn: Callable[[], object], changes: int) -> bool:
        """Return whether ``fn`` crashed after so many changes."""
        self.changes_left = changes
        try:
            fn()
        except Crash:
            return True
        finally:
            self.changes_left = None
        return False


CRASH_POINT = CrashPoint()  # audit hooks cannot be removed: one for all


@pytest.mark.parametrize(("step", "allowed"), [(30, {20, 30}), (20, {10, 20})], ids=["next", "again"])
def test_trap_10_a_crash_at_any_point_leaves_a_whole_checkpoint(tmp_path: Path, step: int, allowed: set[int]) -> None:
    save_files(tmp_path / "before", 10)
    save_files(tmp_path / "before", 20)
    found = []
    for changes in range(1000):
        folder = tmp_path / f"after_{changes}"
        shutil.copytree(tmp_path / "before", folder)
        crashed = CRASH_POINT.run(lambda folder=folder: save_files(folder, step, "anew", keep=2), changes)
        found.append(assert_whole(find_checkpoint(folder)))
        save_files(folder, 40, keep=1)
        assert names(folder) == ["latest", "step_00000040"]
        if not crashed:
            break
    assert not crashed
    assert changes > 10
    assert found[-1] == step
    assert set(found) == allowed


def save_until_killed(folder: str, connection: Connection) -> None:
    for step in range(1, 10**6):
        save_files(Path(folder), step, keep=2)
        connection.send(step)


def test_trap_10_sigkill_at_random_moments_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    rng = random.Random(0)
    for attempt in range(KILLS):
        folder = tmp_path / str(attempt)
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=save_until_killed, args=(str(folder), theirs), daemon=True)
        process.start()
        theirs.close()
        done = ours.recv()
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        try:
            while True:
                done = ours.recv()
        except EOFError:
            pass
        assert assert_whole(find_checkpoint(folder)) in (done, done + 1)
