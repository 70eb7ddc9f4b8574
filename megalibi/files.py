"""Files that appear only when they are complete: written aside, synced to the disk, and then renamed.

NAME is written as NAME.tmp. An interruption leaves the old file or the new one, never a part; and what was said to be
written is on the disk, so that a power failure does not take it back. The file aside is locked while it is written:
a second process that would write the same file is refused at once, and what a killed process left is taken over,
because a lock ends with its process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from megalibi.errors import FileError

ASIDE_SUFFIX = ".tmp"
"""The end of the name of a file that is being written, or that a killed process left."""
# NFS without a lock daemon, Lustre mounted without flock, and file systems in user space that have none.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class FileInUseError(BlockingIOError):
    """Another process is writing the file."""


class AsideFile:
    """A file that is being written: NAME.tmp, which becomes NAME by ``commit``.

    Args:
        path: The file to write; its folder must exist.
        replace_link: Replace a symbolic link whatever it leads to. Without it, only a link to a file is replaced.

    Raises:
        FileInUseError: Another process is writing it.
        OSError: It cannot be written, or its name is that of a device, a pipe or the like.
    """

    def __init__(self, path: str | os.PathLike[str], *, replace_link: bool = False) -> None:
        self.path = Path(path)
        is_link = replace_link and self.path.is_symlink()
        if not is_link and self.path.exists() and not self.path.is_file():  # else /dev/null would go for everybody
            raise OSError(errno.EINVAL, "its name is that of something that is no file", os.fspath(path))
        self._aside = self.path.with_name(self.path.name + ASIDE_SUFFIX)
        self.file: BinaryIO = _open_locked(self._aside, self.path)
        """What to write to."""

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        sync_file(self.file)

    def commit(self) -> None:
        """Sync, put the file in place, and wait until its name is on the disk."""
        self.sync()
        rename_synced(self._aside, self.path)
        self.file.close()  # last, because it ends the lock

    def discard(self) -> None:
        """Remove what was written; after ``commit`` there is nothing to remove."""
        if self.file.closed:
            return
        # After a commit that failed half-way the name may be another process's.
        if _names(self._aside, self.file.fileno()):
            self._aside.unlink()
        with contextlib.suppress(OSError):  # closing writes what is buffered, and the disk may be full
            self.file.close()


@contextlib.contextmanager
def open_aside(path: str | os.PathLike[str], *, replace_link: bool = False) -> Iterator[BinaryIO]:
    """Give a binary file to write to; leaving normally puts it in place, leaving by an exception removes it.

    Args:
        path: The file to write; its folder must exist.
        replace_link: Replace a symbolic link whatever it leads to.

    Raises:
        OSError: In the cases in which AsideFile raises it.
    """
    aside = AsideFile(path, replace_link=replace_link)
    try:
        yield aside.file
        aside.commit()
    finally:
        aside.discard()


def write_aside(path: str | os.PathLike[str], content: bytes | str, *, replace_link: bool = False) -> None:
    """Write a whole file aside and put it in place.

    Args:
        path: The file to write; its folder must exist.
        content: Text is written as UTF-8, with the line ends that it has.
        replace_link: Replace a symbolic link whatever it leads to.

    Raises:
        OSError: In the cases in which AsideFile raises it.
    """
    with open_aside(path, replace_link=replace_link) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_synced(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file in place and wait until it is on the disk: for a folder that is itself renamed when complete."""
    with open(path, "wb") as file:
        file.write(content)
        sync_file(file)


def sync_file(file: BinaryIO) -> None:
    """Wait until what was written to a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Wait until a folder's names are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # else a file system that syncs no folders, as some on a network
            raise
    finally:
        os.close(descriptor)


def rename_synced(path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
    """Rename a file or a folder within its folder, and wait until the new name is on the disk.

    Args:
        path: What to rename; all that is in it must be synced before.
        new_path: Its new name. A file of that name is replaced; a folder of that name must be empty.

    Raises:
        OSError: It cannot be renamed.
    """
    os.replace(path, new_path)
    sync_folder(Path(new_path).parent)


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Make a folder and those above it that do not exist, and wait until the new names are on the disk."""
    path = Path(folder)
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def _open_locked(aside: Path, path: Path) -> BinaryIO:
    """Open the file aside for this process alone, and empty it of what a killed process left."""
    while True:
        descriptor = os.open(aside, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock_file(descriptor, path)
            if _names(aside, descriptor):  # else its writer renamed it between our two calls: begin anew
                os.ftruncate(descriptor, 0)
                return os.fdopen(descriptor, "wb")
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def lock_file(descriptor: int, path: Path) -> bool:
    """Lock an open file for this process, until it is closed or the process ends.

    Args:
        descriptor: The open file's descriptor.
        path: The name of the file in the error message.

    Returns:
        Whether the file is locked: some file systems have no locks.

    Raises:
        FileInUseError: Another process has locked it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileInUseError(errno.EAGAIN, f"another process is writing {path}", os.fspath(path)) from None
    except OSError as error:
        # Where there are no locks, two writers of one file are not noticed. Refusing every file on such a disk would
        # harm those who write once, which is nearly everybody.
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _names(path: Path, descriptor: int) -> bool:
    """Return whether a path is a name of the file that is open."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def write_json(fields: Mapping[str, Any], output: Path) -> None:
    """Write a JSON file aside and rename it: an interruption leaves the old file or the new one, never a part.

    Args:
        fields: The content. A list of numbers stands on one line of the file.
        output: The file to write; its folder must exist.

    Raises:
        FileError: The file cannot be written.
    """
    text = re.sub(r"\[\n[-+.\deE,\s]+\]", lambda numbers: " ".join(numbers[0].split()), json.dumps(fields, indent=1))
    try:
        write_aside(output, text + "\n")
    except OSError as error:
        raise FileError(f"{output} cannot be written: {error.strerror}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the fields of a JSON file.

    Raises:
        FileError: It cannot be read, or is no object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise FileError(f"{path}: must be a JSON object")
    return fields
