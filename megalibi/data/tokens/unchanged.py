"""Whether a token file is still what it was when it was opened: a look that costs a few microseconds for each batch.

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


class UnchangedFiles:
    """Remembers what the system says of some files; make it before they are read.

    Args:
        paths: The files of one token file.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._seen = self._look()

    def check(self, known: Identity | None, identify: Callable[[], Identity]) -> None:
        """Compare what the system says now; only where that differs, read the content again.

        A file that was touched, moved or copied over with the same content is taken.

        Args:
            known: The identity that the files had; None: it is not known, and no change is taken.
            identify: Reads the identity that they have now.

        Raises:
            DataError: The content is another one, or a file has another size.
            OSError: A file is gone, or may not be read.
        """
        seen = self._look()
        for path, now, then in zip(self._paths, seen, self._seen, strict=True):
            if now == then:
                continue
            sizes = f"{then[0]} bytes then, {now[0]} now" if now[0] != then[0] else "of the same size"
            if now[0] != then[0] or known is None or identify() != known:
                raise DataError(
                    f"{path}: changed while it is being read ({sizes}): put the file back as it was, and let nothing "
                    "write into it"
                )
            _LOGGER.warning(
                "%s was touched or replaced while it is being read; its size and its checksum are as before", path
            )
        self._seen = seen

    def _look(self) -> tuple[tuple[int, int, int, int], ...]:
        """Return size, times of modification and of change, and inode of each file."""
        stats = [path.stat() for path in self._paths]
        return tuple((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for stat in stats)
