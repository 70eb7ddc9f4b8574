"""Checks of what a command will write, made before its work, so that no hours of work end at a bad file name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from megalibi.errors import ConfigError, FileError
from megalibi.files import ASIDE_SUFFIX, make_folder

PICTURE_SUFFIXES = (".eps", ".jpeg", ".jpg", ".pdf", ".png", ".svg", ".webp")
"""Endings of the names of pictures that matplotlib can draw without other packages."""


def check_outputs(outputs: Mapping[str, Path | None]) -> None:
    """Check that files can be written, and make their folders.

    Args:
        outputs: Each file by the option that names it; None: the file is not wanted.

    Raises:
        ConfigError: A file is a folder, or two options name the same file; the message begins with the option.
        FileError: A file cannot be written; the message begins with the option.
    """
    options: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        if os.path.isdir(path):
            raise ConfigError(f"{option}={path}: must be the name of a file, and is a folder")
        _check_place(path, f"{option}={path}", is_folder=False)
        try:
            make_folder(path.parent)
        except OSError as error:
            raise FileError(f"{option}={path} cannot be written: {error.strerror}") from error
        other = options.setdefault(path.resolve(), option)
        if other != option:
            raise ConfigError(f"{option}={path}: must be another file than that of {other}")


def check_picture(path: Path | None, option: str) -> None:
    """Check that the ending of a picture's name is a format that can be drawn.

    Args:
        path: The picture; None: none is wanted.
        option: The option that names it.

    Raises:
        ConfigError: The format cannot be drawn; the message begins with the option.
    """
    if path is not None and path.suffix.lower() not in PICTURE_SUFFIXES:
        raise ConfigError(f"{option}={path}: must end in one of {', '.join(PICTURE_SUFFIXES)}")


def check_folder(folder: Path, name: str, *, files: Sequence[str] = (), folders: Sequence[str] = ()) -> None:
    """Check that files can be written into a folder, which need not exist yet. Nothing is made.

    Args:
        folder: The folder of the files.
        name: The option or field that names the folder; the message of an error begins with it.
        files: The names of the files that will be written there.
        folders: The names of the folders that will be made there.

    Raises:
        FileError: One of them cannot be written.
    """
    what = f"{name}={folder}"
    _check_place(folder, what, is_folder=True)
    for entry in files:
        _check_place(folder / entry, what, is_folder=False)
    for entry in folders:
        _check_place(folder / entry, what, is_folder=True)


def _check_place(path: Path, what: str, *, is_folder: bool) -> None:
    """Check that a file or folder can be written: it itself if it exists, else the folder in which it will be made."""
    if not is_folder:
        aside = path.with_name(path.name + ASIDE_SUFFIX)
        if os.path.isdir(aside):
            raise FileError(
                f"{what} cannot be written: {aside} is a folder, but the file is written there first: move it away"
            )
    while True:
        try:
            path.lstat()
            break
        except (FileNotFoundError, NotADirectoryError):
            path, is_folder = path.parent, True
        except (OSError, ValueError) as error:  # such as a name that is too long
            raise FileError(f"{what} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    if is_folder and not path.is_dir():
        raise FileError(f"{what} cannot be written: {path} is no folder")
    if not is_folder and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise FileError(f"{what} cannot be written: {path} must be a file, and is {kind}")
    if not os.access(path, os.W_OK | os.X_OK if is_folder else os.W_OK):
        raise FileError(f"{what} cannot be written: {path} is read-only")
    if is_folder:
        _try_folder(path, what)
    if not is_folder:  # the file is written beside the old one, and renamed
        _check_place(path.parent, what, is_folder=True)


def _try_folder(folder: Path, what: str) -> None:
    """Make a file without a name, because permissions say little about root, /proc and disks over a network."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise FileError(
            f"{what} cannot be written: {folder} takes no file ({error.strerror}): give a folder on another disk, or "
            "make room there"
        ) from error
