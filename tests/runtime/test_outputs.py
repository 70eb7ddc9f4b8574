from __future__ import annotations

import multiprocessing as mp
import os
import re
import tempfile
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from megalibi.errors import ConfigError, FileError, UserError
from megalibi.report.plots import save_figure
from megalibi.runtime.outputs import PICTURE_SUFFIXES, check_folder, check_outputs, check_picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file, a folder, a link to nowhere and a link to itself."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


def assert_refused(
    message: str, check: object, *arguments: object, kind: type[UserError] = FileError, **named: object
) -> None:
    assert callable(check)
    with pytest.raises(kind, match=re.escape(message)) as caught:
        check(*arguments, **named)
    assert "\n" not in str(caught.value)


def test_a_file_can_be_new_or_replaced_and_its_folder_is_made(folder: Path) -> None:
    check_outputs({"--output": folder / "file", "--picture": folder / "new" / "folders" / "a.png", "--json": None})
    assert (folder / "new" / "folders").is_dir()
    assert not list((folder / "new" / "folders").iterdir())


def test_what_cannot_be_a_file_is_said_with_its_option(folder: Path) -> None:
    for name, reason in {
        "file/x": "file is no folder",
        "file/x/y": "file is no folder",
        "dangling": "dangling must be a file, and is no regular file",
        "loop/x": "Too many levels of symbolic links",
        "n" * 300: "File name too long",
    }.items():
        path = folder / name
        assert_refused(f"--output={path} cannot be written: ", check_outputs, {"--output": path})
        assert_refused(reason, check_outputs, {"--picture": None, "--output": path})
    message = f"--output={folder / 'folder'}: must be the name of a file, and is a folder"
    assert_refused(message, check_outputs, {"--output": folder / "folder"}, kind=ConfigError)
    assert_refused("/dev/null must be a file, and is no regular file", check_outputs, {"--output": Path("/dev/null")})


def test_two_options_name_two_files(folder: Path) -> None:
    same = {"--output": folder / "a.png", "--picture": folder / "folder" / ".." / "a.png"}
    assert_refused("a.png: must be another file than that of --output", check_outputs, same, kind=ConfigError)


def test_a_folder_can_be_there_or_be_made_and_nothing_is_made(folder: Path) -> None:
    check_folder(folder / "folder", "train.output_dir", files=("a", "b"), folders=("c",))
    check_folder(folder / "new" / "folder", "train.output_dir", files=("a", "b"), folders=("c",))
    assert sorted(path.name for path in folder.iterdir()) == ["dangling", "file", "folder", "loop"]
    for name in ("file", "file/x", "dangling", "dangling/x", "loop", "loop/x", "n" * 300):
        assert_refused(f"there={folder / name} cannot be written: ", check_folder, folder / name, "there")


def write_as_nobody(folder: str, answers: mp.Queue[str]) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)  # root may write everywhere
    for path in (Path(folder), Path(folder) / "new"):
        try:
            check_folder(path, "train.output_dir")
        except FileError as error:
            answers.put(str(error))


def test_a_folder_that_may_not_be_written_is_said() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        context = mp.get_context("fork")
        answers = context.Queue()
        process = context.Process(target=write_as_nobody, args=(name, answers))
        process.start()
        for path in (name, f"{name}/new"):
            assert answers.get(timeout=60) == f"train.output_dir={path} cannot be written: {name} is read-only"
        process.join()
        Path(name).chmod(0o755)


def test_a_picture_has_a_format_that_can_be_drawn(tmp_path: Path) -> None:
    for suffix in (*PICTURE_SUFFIXES, ".PNG"):
        check_picture(tmp_path / f"a{suffix}", "--picture")
        save_figure(Figure(figsize=(1, 1)), tmp_path / f"a{suffix}")
        assert (tmp_path / f"a{suffix}").stat().st_size > 0
    check_picture(None, "--picture")
    for name in ("a.xyz", "a", "a.json", ".png"):
        message = f"--picture={name}: must end in one of .eps, .jpeg, .jpg, .pdf, .png, .svg"
        assert_refused(message, check_picture, Path(name), "--picture", kind=ConfigError)
