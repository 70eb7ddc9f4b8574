"""What a command will write, checked before its work: hours of it shall not end at a name that cannot be."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from megalibi.errors import ConfigError
from megalibi.files import ASIDE_SUFFIX, make_folder
from megalibi.metrics.records import CONFIG_FILE, INFO_FILE, METRICS_FILE
from megalibi.metrics.tensorboard import TENSORBOARD_FOLDER

PICTURE_SUFFIXES = (".eps", ".jpeg", ".jpg", ".pdf", ".png", ".svg", ".webp")
"""Formats of pictures that need nothing but matplotlib."""


def check_outputs(outputs: Mapping[str, Path | None]) -> None:
    """Make the folders of files, and find out whether the files can be written there.

    Args:
        outputs: Each file by the option that names it; None: not asked for.

    Raises:
        ConfigError: One cannot be written, or two are the same; the message begins with the option.
    """
    options: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        if os.path.isdir(path):
            raise ConfigError(f"{option}={path} is a folder: give the name of a file")
        _check_place(path, f"{option}={path}", is_folder=False)
        try:
            make_folder(path.parent)
        except OSError as error:
            raise ConfigError(f"{option}={path} cannot be written: {error.strerror}") from error
        other = options.setdefault(path.resolve(), option)
        if other != option:
            raise ConfigError(f"{option}={path} is not allowed: another file than that of {other} is")


def check_picture(path: Path | None, option: str) -> None:
    """Find out whether a picture's name says a format that can be drawn.

    Raises:
        ConfigError: It does not; the message begins with the option.
    """
    if path is not None and path.suffix.lower() not in PICTURE_SUFFIXES:
        raise ConfigError(
            f"{option}={path} is not allowed: a name that ends in one of {', '.join(PICTURE_SUFFIXES)} is"
        )


def check_folder(folder: Path, name: str, *, files: Sequence[str] = (), folders: Sequence[str] = ()) -> None:
    """Find out whether files can be written into a folder that need not exist yet; nothing is made.

    Args:
        folder: Where they will be.
        name: What an error begins with: an option, a field.
        files: The names of files that will be written there.
        folders: The same of folders.

    Raises:
        ConfigError: They cannot.
    """
    what = f"{name}={folder}"
    _check_place(folder, what, is_folder=True)
    for entry in files:
        _check_place(folder / entry, what, is_folder=False)
    for entry in folders:
        _check_place(folder / entry, what, is_folder=True)


def check_run_folder(folder: Path, name: str, *, folders: Sequence[str] = ()) -> None:
    """Find out whether a run can write what a report reads, and some folders more.

    Raises:
        ConfigError: It cannot.
    """
    check_folder(folder, name, files=(CONFIG_FILE, INFO_FILE, METRICS_FILE), folders=(TENSORBOARD_FOLDER, *folders))


def _check_place(path: Path, what: str, *, is_folder: bool) -> None:
    """Find out whether a file or a folder can be written: itself if it exists, else where it will be made."""
    if not is_folder:
        aside = path.with_name(path.name + ASIDE_SUFFIX)
        if os.path.isdir(aside):
            raise ConfigError(f"{what} cannot be written: {aside} is a folder, and is written first: move it away")
    while True:
        try:
            path.lstat()
            break
        except (FileNotFoundError, NotADirectoryError):
            path, is_folder = path.parent, True
        except (OSError, ValueError) as error:  # such as a name that is too long
            raise ConfigError(f"{what} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    if is_folder and not path.is_dir():
        raise ConfigError(f"{what} cannot be written: {path} is no folder")
    if not is_folder and not path.is_file():
        kind = "a folder" if path.is_dir() else "no file"
        raise ConfigError(f"{what} cannot be written: {path} is {kind}, the name of a file is needed")
    if not os.access(path, os.W_OK | os.X_OK if is_folder else os.W_OK):
        raise ConfigError(f"{what} cannot be written: {path} is read-only")
    if is_folder:
        _try_folder(path, what)
    if not is_folder:  # a new file is written beside it, and renamed
        _check_place(path.parent, what, is_folder=True)


def _try_folder(folder: Path, what: str) -> None:
    """Make a file without a name: permissions say little of root, of /proc, and of disks over a network."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"{what} cannot be written: {folder} takes no file ({error.strerror}): give a folder on another disk, or "
            "make room there"
        ) from error
