"""Folders that appear when they are complete: written as OUT.partial.SOMETHING, synced to the disk, and then renamed.

Nobody else has that name. It is locked while it is written, and a lock ends with its process: what a killed process
left is removed by the next one that writes the same OUT.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from megalibi.files import FileInUseError, lock_file, make_folder, rename_synced, sync_folder

PARTIAL_SUFFIX = ".partial"
"""What the name of a folder has, after its own, while it is being written, or if a killed process left it."""
_APPEARED = "has come to exist meanwhile, and is kept"
_FRESH_SECONDS = 10.0
"""A folder is locked soon after it is made, and not looked at before."""
_KEPT_LETTERS = 50
"""Of OUT's name in that of the folder, which may have 255 bytes."""
# Links that a file system does not have, or not for this file.
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


@contextlib.contextmanager
def writing_folder(output: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes OUT at the end; leaving by an exception removes it.

    Args:
        output: The new folder; it must not exist. Its parents are made.

    Raises:
        FileExistsError: It has come to exist meanwhile.
        OSError: The disk is full or fails.
    """
    with working_beside(output) as folder:
        yield folder
        sync_files(folder)
        rename_new(folder, output)


@contextlib.contextmanager
def working_beside(output: Path) -> Iterator[Path]:
    """Give a folder beside a file or folder, from which this can be renamed; what is left of it at the end is removed.

    Args:
        output: What is to be made. Its parents are made now.

    Raises:
        OSError: The disk is full or fails.
    """
    stem = f"{output.name[:_KEPT_LETTERS]}{PARTIAL_SUFFIX}."
    make_folder(output.parent)
    for leftover in output.parent.glob(f"{glob.escape(stem)}*"):
        _remove_if_left(leftover)
    folder = output.with_name(f"{stem}{uuid.uuid4().hex[:12]}")
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock_file(descriptor, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)  # last, because it ends the lock


def sync_files(folder: Path) -> None:
    """Wait until all files of a folder are on the disk, those too that libraries of others wrote, and their names."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def rename_new(path: Path, new_path: Path) -> None:
    """Rename a file or a folder to a name that nothing has, and wait until it is on the disk.

    Raises:
        FileExistsError: Something has the name, and is kept.
        OSError: It cannot be renamed.
    """
    try:
        if not path.is_file():
            raise OSError(errno.EPERM, "folders have no links")
        os.link(path, new_path)  # which fails where there is something, unlike a rename
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, _APPEARED, os.fspath(new_path)) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(new_path):
            raise FileExistsError(errno.EEXIST, _APPEARED, os.fspath(new_path)) from None
        rename_synced(path, new_path)
    else:
        path.unlink()
        sync_folder(new_path.parent)


def _remove_if_left(folder: Path) -> None:
    """Remove a folder that no process has locked."""
    try:
        if time.time() - folder.stat().st_mtime < _FRESH_SECONDS:
            return
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # another's, or gone meanwhile
        return
    try:
        if lock_file(descriptor, folder):
            shutil.rmtree(folder, ignore_errors=True)
    except FileInUseError:
        pass
    finally:
        os.close(descriptor)
