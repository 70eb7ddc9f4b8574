from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megalibi.errors import FileError
from megalibi.files import (
    AsideFile,
    FileInUseError,
    make_folder,
    open_aside,
    rename_synced,
    sync_folder,
    write_aside,
    write_json,
    write_synced,
)
from tests.power_failure.c_library import build_library

ROOT = Path(__file__).parents[1]

CONTEXT = multiprocessing.get_context("spawn")
CONTENTS = [bytes([letter]) * 100_000 for letter in b"abc"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.json"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_replaces_the_old_one(path: Path) -> None:
    write_aside(path, "old, and longer than the new")
    with open_aside(path) as file:
        file.write(b"new\r\n")
        file.flush()
        assert path.read_bytes() == b"old, and longer than the new"
    assert path.read_bytes() == b"new\r\n"
    assert names(path.parent) == ["file.json"]


def test_text_is_utf8_with_its_own_line_ends(path: Path) -> None:
    write_aside(path, "ß\r\n\n")
    assert path.read_bytes() == "ß\r\n\n".encode()


def test_permissions_are_those_of_any_new_file(path: Path) -> None:
    (path.parent / "plain").write_text("")
    write_aside(path, "")
    assert path.stat().st_mode == (path.parent / "plain").stat().st_mode
    assert stat.S_ISREG(path.stat().st_mode)


def test_an_error_leaves_the_old_file_and_nothing_aside(path: Path) -> None:
    write_aside(path, "old")
    with pytest.raises(TypeError), open_aside(path) as file:
        file.writelines([b"new", None])  # type: ignore[list-item]
    assert path.read_text() == "old"
    assert names(path.parent) == ["file.json"]


def test_a_rename_that_fails_leaves_nothing_aside(path: Path) -> None:
    with pytest.raises(IsADirectoryError), open_aside(path):
        path.mkdir()
    assert names(path.parent) == ["file.json"]


@pytest.mark.parametrize("special", ["/dev/null", "pipe", "folder"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, special: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    kind = (tmp_path / special).stat().st_mode
    with pytest.raises(OSError, match="its name is that of something that is no file"):
        write_aside(tmp_path / special, "x")
    assert (tmp_path / special).stat().st_mode == kind


def test_what_a_killed_process_left_is_taken_over(path: Path) -> None:
    process, connection = start_writing(path)
    process.kill()
    process.join()
    assert names(path.parent) == ["file.json.tmp"]
    assert path.with_name("file.json.tmp").stat().st_size == 100_000
    connection.close()
    write_aside(path, "short")
    assert path.read_text() == "short"
    assert names(path.parent) == ["file.json"]


def start_writing(path: Path) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    """Return a process that has half a file aside, and goes on when told to."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=write_slowly, args=(str(path), theirs), daemon=True)
    process.start()
    theirs.close()
    assert ours.recv() == "half"
    return process, ours


def write_slowly(path: str, connection: Connection) -> None:
    with open_aside(path) as file:
        file.write(CONTENTS[0])
        file.flush()
        connection.send("half")
        connection.recv()
        file.write(CONTENTS[0])


def test_a_second_writer_is_refused_at_once_and_harms_nothing(path: Path) -> None:
    process, connection = start_writing(path)
    with pytest.raises(FileInUseError) as refusal:
        write_aside(path, "x")
    assert refusal.value.strerror == f"another process is writing {path}"
    connection.send("go on")
    process.join()
    assert process.exitcode == 0
    assert path.read_bytes() == 2 * CONTENTS[0]
    write_aside(path, "y")
    assert path.read_text() == "y"
    assert names(path.parent) == ["file.json"]


def test_discarding_after_the_end_harms_no_other_writer(path: Path) -> None:
    first = AsideFile(path)
    first.file.write(b"first")
    first.commit()
    second = AsideFile(path)
    first.discard()
    second.file.write(b"second")
    second.commit()
    assert path.read_bytes() == b"second"


def write_often(path: str, number: int, connection: Connection) -> None:
    done = 0
    connection.recv()
    while done < 100:
        with contextlib.suppress(FileInUseError):
            write_aside(path, CONTENTS[number])
            done += 1


def test_writers_in_a_race_never_mix(path: Path) -> None:
    """Three processes open, lock, rename and lose the name to each other; every content that is seen is whole."""
    pipes = [CONTEXT.Pipe() for _ in CONTENTS]
    processes = [
        CONTEXT.Process(target=write_often, args=(str(path), number, theirs), daemon=True)
        for number, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for ours, _ in pipes:
        ours.send("go")
    seen = set(watch(path, processes))
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert seen <= set(CONTENTS)
    assert names(path.parent) == ["file.json"]


def watch(path: Path, processes: list[multiprocessing.process.BaseProcess]) -> Iterator[bytes]:
    while any(process.is_alive() for process in processes):
        if path.exists():
            yield path.read_bytes()
    yield path.read_bytes()


def test_on_a_file_system_without_locks_files_are_written_unlocked(path: Path) -> None:
    """As on NFS without a lock daemon; there is none here, so flock is one that says what it would say."""
    library = path.with_name("no_locks.so")
    source = "#include <errno.h>\nint flock(int file, int how) { errno = ENOLCK; return -1; }"
    build_library(library, source)
    code = "import sys; from megalibi.files import write_aside; write_aside(sys.argv[1], 'x')"
    variables = {**os.environ, "LD_PRELOAD": str(library)}
    subprocess.run([sys.executable, "-c", code, str(path)], env=variables, cwd=ROOT, check=True)
    assert path.read_text() == "x"
    assert names(path.parent) == ["file.json", "no_locks.so"]


def test_folders_are_made_with_those_above_them(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    write_synced(tmp_path / "a" / "b" / "file", b"x")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"x"


def test_a_file_system_that_syncs_no_folder_is_no_error() -> None:
    """/proc is one."""
    sync_folder("/proc")
    with pytest.raises(NotADirectoryError):
        sync_folder(__file__)


def test_a_link_is_replaced_when_that_is_asked_for(tmp_path: Path) -> None:
    """And what it led to stays; otherwise a link to a folder or a device is refused, as those are."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "old").write_text("old")
    for target in ("folder", "old", "/dev/null", "nowhere"):
        link = tmp_path / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        if target in ("folder", "/dev/null"):
            with pytest.raises(OSError, match="something that is no file"):
                write_aside(link, "new")
            assert link.is_symlink()
        write_aside(link, "new", replace_link=True)
        assert not link.is_symlink()
        assert link.read_text() == "new"
    assert names(tmp_path) == ["folder", "link", "old"]
    assert (tmp_path / "old").read_text() == "old"
    with pytest.raises(OSError, match="something that is no file"):
        write_aside(tmp_path / "folder", "new", replace_link=True)


def test_a_folder_is_renamed_and_takes_no_full_ones_place(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_text("x")
    rename_synced(tmp_path / "new", tmp_path / "final")
    assert names(tmp_path) == ["final"]
    (tmp_path / "new").mkdir()
    with pytest.raises(OSError, match="not empty"):
        rename_synced(tmp_path / "new", tmp_path / "final")
    assert names(tmp_path) == ["final", "new"]


def test_a_json_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match=r"folder cannot be written: "):
        write_json({}, tmp_path / "folder")


def test_a_json_file_is_replaced_whole_and_its_numbers_stand_on_one_line(tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    output.write_text("old")
    fields = {"losses": [1.5, -2e-7, 3], "names": ["[1,  2]", "b"], "rows": [{"x": [1, 2]}], "none": []}
    write_json(fields, output)
    assert json.loads(output.read_text()) == fields
    assert "[ 1.5, -2e-07, 3 ]" in output.read_text()
    assert list(tmp_path.iterdir()) == [output]
