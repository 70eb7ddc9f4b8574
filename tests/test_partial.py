from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalibi import partial
from megalibi.partial import rename_new, working_beside, writing_folder

WRITER = """
import signal, sys
from pathlib import Path
from megalibi.partial import writing_folder

with writing_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print("writing", flush=True)
    signal.pause()
"""


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with writing_folder(output) as folder:
        (folder / "a").write_text("a")
        assert not output.exists()
        assert folder.parent == output.parent
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    with pytest.raises(KeyboardInterrupt), writing_folder(tmp_path / "b"):
        raise KeyboardInterrupt
    assert not list(tmp_path.glob("b*"))


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-c", WRITER, str(output)]
    killed, other = (subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2))
    try:
        for writer in (killed, other):
            assert writer.stdout is not None
            assert writer.stdout.readline() == "writing\n"
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        with working_beside(output):  # one that has just been made is not looked at
            assert len(list(tmp_path.glob("out.partial.*"))) == 3
        monkeypatch.setattr(partial, "_FRESH_SECONDS", 0.0)
        time.sleep(0.01)
        with working_beside(output):
            assert len(list(tmp_path.glob("out.partial.*"))) == 2
    finally:
        other.kill()
        other.wait()


def test_a_name_that_something_has_is_kept(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).write_text(name)
    with pytest.raises(FileExistsError, match="meanwhile"):
        rename_new(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "old"
    rename_new(tmp_path / "new", tmp_path / "newer")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["newer", "old"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileExistsError, match="meanwhile"):
        rename_new(tmp_path / "folder", tmp_path / "old")


def test_a_file_system_without_links_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, new_path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "new").write_text("new")
    rename_new(tmp_path / "new", tmp_path / "newer")
    (tmp_path / "other").write_text("other")
    with pytest.raises(FileExistsError, match="meanwhile"):
        rename_new(tmp_path / "other", tmp_path / "newer")


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    with writing_folder(tmp_path / ("\U0001f600" * 60)) as folder:
        (folder / "a").write_text("a")
    assert len(list(tmp_path.iterdir())) == 1
