"""Whether a token file is still what it was when it was opened: a look that costs some microseconds for each batch.

A run maps its token files into memory for days. A program that writes into one, or a copy that was not finished, would
change what is learned without a word, and reading past the end of a file that was cut ends a process by SIGBUS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megalibi.data.tokens.identity import Identity
from megalibi.errors import DataError
from megalibi.log import get_logger

_LOGGER = get_logger(__name__)
_Stat = tuple[int, int, int, int]
"""Inode, size, and times of modification and of the inode's change."""


class UnchangedFiles:
    """Remembers what the system says of some files; make it before they are read.

    Args:
        paths: The files of one token file.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._seen = {path: _look(path) for path in paths}

    def check(self, known: Identity | None, identify: Callable[[], Identity]) -> None:
        """Compare what the system says now; only where that differs, read the content again.

        A file that was touched is taken. So is one that was deleted, or replaced by another of its name: what was
        mapped is there until it is let go, and nobody can reach it any more to change it.

        Args:
            known: The identity that the files had; None: it is not known, and no change is taken.
            identify: Reads the identity that they have now.

        Raises:
            DataError: The content is another one, or a file has another size.
        """
        for path, then in list(self._seen.items()):
            now = _look(path)
            if now == then:
                continue
            if now is None or then is None or now[0] != then[0]:
                del self._seen[path]
                _LOGGER.warning("%s was deleted or replaced: this run goes on with the file that it has opened", path)
                continue
            sizes = f"{then[1]} bytes then, {now[1]} now" if now[1] != then[1] else "of the same size"
            if now[1] != then[1] or known is None or identify() != known:
                raise DataError(
                    f"{path}: changed while it is being read ({sizes}): put the file back as it was, and let nothing "
                    "write into it"
                )
            self._seen[path] = now
            _LOGGER.warning("%s was touched while it is being read; its size and its checksum are as before", path)


def _look(path: Path) -> _Stat | None:
    """Return what the system says of a file; None if it is not to be found any more."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
