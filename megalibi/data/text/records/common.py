"""What all readers of records share: what a record is, and what is said of one whose text cannot be had."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from megalibi.data.text.sources import BROKEN_FILE, Source, broken
from megalibi.errors import DataError

_FIELDS_SAID = 20
_BLOCK_BYTES = 1 << 20


class BadRecord(NamedTuple):
    """A record whose text cannot be had."""

    place: str
    """Where in the file: line 12, row 3."""
    reason: str
    """What is wrong with it."""


Record = str | None | BadRecord
"""A text; None: the record has none, because the field is null or is not there."""


class BadTextError(ValueError):
    """A reason for a BadRecord."""


def no_field(name: str, text_key: str, fields: Iterable[object]) -> DataError:
    """Return the error for a file whose records do not have the field."""
    names = [name if name == name.strip() and name.isprintable() else repr(name) for name in map(str, fields)]
    listed = ", ".join(names[:_FIELDS_SAID]) + (", ..." if len(names) > _FIELDS_SAID else "")
    return DataError(f"{name}: no column {text_key!r}; choose one of {listed} with --text-key")


def find_column(name: str, columns: Sequence[str], text_key: str) -> int:
    """Return the place of the column that holds the text.

    Raises:
        DataError: There is no such column, or several.
    """
    count = columns.count(text_key)
    if count == 0:
        raise no_field(name, text_key, columns)
    if count > 1:
        raise DataError(f"{name}: {count} columns are called {text_key!r}")
    return columns.index(text_key)


def check_encodes(text: str) -> str:
    """Return the text.

    Raises:
        BadTextError: It holds half of a surrogate pair, which JSON can write and which is no character.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadTextError(
                f"it holds {text[error.start]!r}, half of a surrogate pair, which is no character"
            ) from error
    return text


def not_utf8(source: Source) -> DataError:
    """Return the error for a file that is not UTF-8, with the place of the first byte that is not.

    The file is read once more to find that place. A damaged compressed file may give bytes that are no text before it
    is found to be damaged; then the damage is the error.
    """
    try:
        return _find_not_utf8(source)
    except BROKEN_FILE as error:
        return broken(source, error)


def _find_not_utf8(source: Source) -> DataError:
    decoder = codecs.getincrementaldecoder("utf-8")()
    num_read, line = 0, 1
    with source.open() as file:
        while block := file.read(_BLOCK_BYTES):
            pending = decoder.getstate()[0]
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                while source.compression and file.read(_BLOCK_BYTES):
                    pass  # to its checksum
                return _not_utf8(source, line, num_read - len(pending) + error.start, error)
            line += block.count(b"\n")
            num_read += len(block)
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            return _not_utf8(source, line, num_read - len(error.object) + error.start, error)
    raise AssertionError(f"{source.name} was not UTF-8 a moment ago")


def _not_utf8(source: Source, line: int, place: int, error: UnicodeDecodeError) -> DataError:
    is_utf16 = place == 0 and error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    known = "; it begins as UTF-16 does" if is_utf16 else ""
    return DataError(
        f"{source.name}, line {line}, byte {place} of the file: it is not UTF-8 text ({error.reason}){known}; convert "
        "it, for example with iconv"
    )
