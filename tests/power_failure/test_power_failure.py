"""At whatever moment the power fails, what is found on the disk is whole, and what was said to be saved is found.

A real process trains and writes; a preloaded library logs what it does to files, and a disk is replayed from the log
that loses all that was not synced.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.power_failure.c_library import build_library
from tests.power_failure.disk import Disk, File, Folder, Node
from tests.power_failure.write_everything import GOING_BACK, SAVED_EVERY, STEPS

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Logged:
    root: Path
    log: Path


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Logged:
    folder = tmp_path_factory.mktemp("power").resolve()
    library = folder / "file_log.so"
    build_library(library, (HERE / "file_log.c").read_text())
    (folder / "disk").mkdir()
    variables = {"LD_PRELOAD": str(library), "FILE_LOG": str(folder / "log"), "FILE_LOG_FOLDER": str(folder / "disk")}
    done = subprocess.run(
        [sys.executable, str(HERE / "write_everything.py"), str(folder / "disk"), str(folder)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Logged(folder / "disk", folder / "log")


def moments(logged: Logged) -> Iterator[tuple[list[str], Disk]]:
    disk = Disk(logged.root)
    for fields in disk.replay(logged.log):
        yield fields, disk


def test_the_log_misses_nothing(logged: Logged) -> None:
    """What was replayed is what is there."""
    *_, (_, disk) = moments(logged)
    found = {path.relative_to(logged.root).as_posix() for path in logged.root.rglob("*")}
    assert {name for name in names_below(disk.top) if "tensorboard" not in name} == {
        name for name in found if "tensorboard" not in name
    }
    for name in found:
        node, path = disk.find(name), logged.root / name
        if isinstance(node, File) and path.stat().st_size <= 96:
            assert node.data == path.read_bytes()


def names_below(folder: Folder, prefix: str = "") -> Iterator[str]:
    for name, node in folder.names.items():
        yield prefix + name
        if isinstance(node, Folder):
            yield from names_below(node, f"{prefix}{name}/")


def step_of(name: str | None) -> int:
    return int(name.removeprefix("step_")) if name else 0


def find_checkpoint(names: dict[str, Node]) -> str | None:
    """Find it as a run does that comes after the power failure; every checkpoint that is found must be whole."""
    complete = set()
    for name, node in names.items():
        is_step = re.fullmatch(r"step_\d{8}", name) and isinstance(node, Folder)
        if is_step and any(node.possible("manifest.json")):
            assert_whole(node, name)
            complete.add(name)
    latest = names.get("latest")
    if latest is None:
        return max(complete, default=None)
    assert isinstance(latest, File)
    assert latest.is_synced, "latest is empty or torn"
    named = latest.data.decode().strip()
    assert named in complete, f"latest names {named}, of {complete}"
    return named


def assert_whole(checkpoint: Folder, name: str) -> None:
    assert len(checkpoint.all_names()) >= 4
    for file_name in checkpoint.all_names():
        node = checkpoint.certain(file_name)
        assert isinstance(node, File), f"{name}/{file_name} may be missing"
        assert node.is_synced, f"{name}/{file_name} may be torn"


def logged_steps(node: Node | None, *, synced: bool) -> int:
    assert node is None or isinstance(node, File)
    data = b"" if node is None else node.synced_data if synced else node.data
    return max(map(int, re.findall(rb'"step": (\d+)', data)), default=0)


def test_training_loses_no_checkpoint_and_no_line_of_one(logged: Logged) -> None:
    seen = set()
    for _, disk in moments(logged):
        # A step's line is written when the save of the step before has begun, which waits for the one before it.
        logged_step = logged_steps(disk.find("runs/a/metrics.jsonl"), synced=False)
        saved = max((logged_step - 1) // SAVED_EVERY - 1, 0) * SAVED_EVERY
        if "trained" in disk.marks:
            saved = STEPS
        folder = disk.certain("runs/a/checkpoints")
        if folder is None:
            assert saved == 0
            continue
        assert isinstance(folder, Folder)
        for names in folder.after_crash():
            found = step_of(find_checkpoint(names))
            assert found >= saved
            if "set aside" not in disk.marks and "trained" not in disk.marks:
                assert logged_steps(disk.certain("runs/a/metrics.jsonl"), synced=True) >= found
            seen.add(found)
    assert seen == {*range(0, STEPS + 1, SAVED_EVERY)}


def test_setting_lines_aside_loses_none(logged: Logged) -> None:
    num_moments = 0
    for _, disk in moments(logged):
        if disk.marks != ["trained"]:
            continue
        folder = disk.certain("runs/a")
        assert isinstance(folder, Folder)
        for names in folder.after_crash():
            kept, dropped = names["metrics.jsonl"], names.get("metrics.dropped.jsonl")
            assert isinstance(kept, File)
            data = kept.synced_data + (dropped.synced_data if isinstance(dropped, File) else b"")
            assert set(map(int, re.findall(rb'"step": (\d+)', data))) == set(range(1, STEPS + 1))
            num_moments += 1
    assert num_moments > 5


def test_a_run_that_goes_back_has_a_whole_checkpoint_at_every_moment(logged: Logged) -> None:
    num_moments = 0
    for fields, disk in moments(logged):
        saved = [mark for mark in disk.marks if mark.startswith("saved")]
        folder = disk.certain("back/checkpoints")
        if not saved:
            continue
        assert isinstance(folder, Folder)
        for names in folder.after_crash():
            found = find_checkpoint(names)
            assert found
            if fields[0] == "mark" and fields[1].startswith("saved"):
                assert f"saved {step_of(found)}" == saved[-1]
                assert names[found] is folder.names[found]
            num_moments += 1
    assert saved == [f"saved {step}" for step in GOING_BACK]
    assert num_moments > 100


def test_token_files_are_of_one_run_and_whole(logged: Logged) -> None:
    seen = set()
    for fields, disk in moments(logged):
        folder = disk.find("data")
        if not isinstance(folder, Folder):
            continue
        for names in folder.after_crash():
            tokens, index = names.get("a.bin"), names.get("a.idx")
            if isinstance(tokens, File) and isinstance(index, File):
                assert tokens.is_synced
                assert index.is_synced
                assert tokens.born == index.born
                seen.add(tokens.born)
        if fields[0] == "remove" and fields[1].endswith("a.idx"):  # the old files go when the new ones are safe
            new = folder.names["a.bin.tmp"], folder.names["a.idx.tmp"]
            assert all(isinstance(file, File) and file.is_synced and file.data for file in new)
        if fields[0] == "mark" and fields[1].startswith("tokens"):
            for name in ("a.bin", "a.idx"):
                file = folder.certain(name)
                assert isinstance(file, File)
                assert file.born == len(disk.marks) - 1
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("path", "mark"),
    [
        ("vocabularies/a.words", "files"),
        ("vocabularies/a.model", "files"),
        ("data/record.json", "files"),
        ("data/figure.png", "files"),
        ("runs/a/config.yaml", "trained"),
        ("runs/a/run_info.json", "trained"),
        ("runs/a/metrics.jsonl", "set aside"),
        ("runs/a/metrics.dropped.jsonl", "set aside"),
    ],
)
def test_a_file_is_whole_and_stays(logged: Logged, path: str, mark: str) -> None:
    """Its name never means a part; when writing it has returned, the new content is on the disk with all its names."""
    checked = 0
    for fields, disk in moments(logged):
        folder, name = disk.find(str(Path(path).parent)), Path(path).name
        if isinstance(folder, Folder) and not path.endswith(".jsonl"):  # which grows line by line
            assert all(file.is_synced for file in folder.possible(name) if isinstance(file, File))
        if fields[0] == "mark" and fields[1].startswith(mark):
            # The folder of data/ is made without a sync: it is not the writer's.
            assert isinstance(folder, Folder)
            file = folder.certain(name) if path.startswith("data/") else disk.certain(path)
            assert file is folder.names[name]
            assert isinstance(file, File)
            assert file.is_synced
            checked += 1
    assert checked > 0
