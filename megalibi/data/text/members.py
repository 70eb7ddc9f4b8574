"""Decompressed bytes of .bz2 and .xz files, of all their members, or an error.

Python's own readers take a damaged member, if it is not the first, for the end of the file: what follows would be left
out without a word.
"""

from __future__ import annotations

import bz2
import io
import lzma
from collections.abc import Callable
from typing import Any

_BLOCK_BYTES = 1 << 16


class MemberReader(io.RawIOBase):
    """A compressed file as a stream of what is in it.

    Args:
        name: The file.
        make: A decompressor for a member.

    Raises:
        EOFError: The file ends within a member.
        OSError: It is damaged, as an LZMAError from ``lzma``.
    """

    def __init__(self, name: str, *, make: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> None:
        self._file = io.FileIO(name)
        self._make = make
        self._decompressor = make()

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the next bytes, at the end with none."""
        while True:
            if self._decompressor.eof:
                rest = self._decompressor.unused_data
                while not rest.strip(b"\0"):  # .xz may be padded with zeros
                    rest = self._file.read(_BLOCK_BYTES)
                    if not rest:
                        return 0
                self._decompressor = self._make()
                data = self._decompressor.decompress(rest.lstrip(b"\0"), len(buffer))
            else:
                block = self._file.read(_BLOCK_BYTES) if self._decompressor.needs_input else b""
                if self._decompressor.needs_input and not block:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                data = self._decompressor.decompress(block, len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
