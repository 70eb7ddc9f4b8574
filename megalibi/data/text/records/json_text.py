"""The texts of JSON records, a line each or in a list."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from megalibi.data.text.records.common import BadRecord, BadTextError, Record, check_encodes, no_field, not_utf8
from megalibi.data.text.sources import BROKEN_FILE, Source, broken
from megalibi.errors import DataError

_BLANKS = b" \t\r\n"
_FIELDS_KEPT = 1_000


class _Fields:
    """The fields that a file's records were seen to have, until one has the text."""

    def __init__(self, text_key: str) -> None:
        self.text_key = text_key
        self.has_text = False
        self._seen: dict[str, None] = {}  # a set in order

    def text_of(self, record: Any) -> str | None:
        """Return the text of a JSON record.

        Raises:
            BadTextError: It is no object, or what it has is no text.
        """
        if not isinstance(record, dict):
            raise BadTextError(f"it is {_kind(record)}, not an object with the field {self.text_key!r}")
        if not self.has_text:
            self.has_text = self.text_key in record
            self._seen.update(dict.fromkeys(record if len(self._seen) < _FIELDS_KEPT else ()))
        value = record.get(self.text_key)
        if value is None:
            return None
        if not isinstance(value, str):
            raise BadTextError(f"{self.text_key} is {_kind(value)}, not text")
        return check_encodes(value)

    def check(self, name: str) -> None:
        """Refuse a file that has records, and none of them has the field."""
        if self._seen and not self.has_text:
            raise no_field(name, self.text_key, self._seen)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


# Numbers are not looked at: Python would refuse to read one of 5,000 digits, and they may stand in other fields.
_DECODER = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=len)


def _decode(line: bytes) -> Any:
    """Return the value of one line.

    Raises:
        BadTextError: It is no JSON in UTF-8.
    """
    try:
        return _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        raise BadTextError(f"it is not UTF-8 text ({error.reason} at byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise BadTextError(f"it is not JSON: {error.msg.removesuffix(' at')} (column {error.colno})") from error
    except RecursionError as error:
        raise BadTextError("its lists and objects are nested too deeply") from error


def read_json_lines(source: Source, text_key: str) -> Iterator[Record]:
    """Yield the text of each line, which is an object."""
    fields, number = _Fields(text_key), 0
    try:
        with source.open() as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not line.strip(_BLANKS):
                    continue
                try:
                    text: Record = fields.text_of(_decode(line))
                except BadTextError as error:
                    text = BadRecord(f"line {number}", str(error))
                yield text
    except BROKEN_FILE as error:
        raise broken(source, error, f"line {number}" if number else "") from error
    fields.check(source.name)


def read_json(source: Source, text_key: str) -> Iterator[Record]:
    """Yield the texts of a .json file: of an object a line, of a list, or of objects over several lines each."""
    try:
        with source.open() as file:
            first = file.readline(1 << 20).removeprefix(codecs.BOM_UTF8)
            while first and not first.strip(_BLANKS):
                first = file.readline(1 << 20)
    except BROKEN_FILE as error:
        raise broken(source, error) from error
    try:
        is_lines = not first.lstrip(_BLANKS).startswith(b"[") and first.endswith(b"\n") and bool(_decode(first))
    except BadTextError:
        is_lines = False
    yield from (read_json_lines if is_lines else _read_json_stream)(source, text_key)


def _read_json_stream(source: Source, text_key: str) -> Iterator[Record]:
    fields, number = _Fields(text_key), 0
    try:
        with source.open() as file:
            for number, value in enumerate(_json_values(file), start=1):
                try:
                    text: Record = fields.text_of(value)
                except BadTextError as error:
                    text = BadRecord(f"record {number}", str(error))
                yield text
    except BadTextError as error:  # where the next record would begin is not known
        raise DataError(f"{source.name}, record {number + 1}: {error}") from error
    except UnicodeDecodeError as error:
        raise not_utf8(source) from error
    except BROKEN_FILE as error:
        raise broken(source, error, f"record {number}" if number else "") from error
    fields.check(source.name)


def _json_values(file: BinaryIO) -> Iterator[Any]:
    """Yield the values of a JSON text's list, or of several texts one after the other.

    Raises:
        BadTextError: It is no JSON.
    """
    stream = _JsonStream(io.TextIOWrapper(file, "utf-8-sig", newline=""))
    if stream.peek() != "[":
        while stream.peek():
            yield stream.value()
        return
    separator = stream.take()
    if stream.peek() == "]":
        stream.take()
        separator = "]"
    while separator != "]":
        yield stream.value()
        separator = stream.take()
        if separator not in (",", "]"):
            missing = "a comma is missing" if separator else "the list ends without ]"
            raise BadTextError(f"it is not JSON: {missing}")
    if stream.peek():
        raise BadTextError("it is not JSON: something follows the list")


class _JsonStream:
    """JSON values from a text that need not fit into the memory."""

    _BLOCK_CHARACTERS = 1 << 20

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file = file
        self._buffer = ""
        self._place = 0

    def peek(self) -> str:
        """Return the next character that is no blank, and stay before it; at the end nothing."""
        while True:
            while self._place < len(self._buffer):
                if self._buffer[self._place] not in " \t\r\n":
                    return self._buffer[self._place]
                self._place += 1
            if not self._read_more():
                return ""

    def take(self) -> str:
        """Return what ``peek`` returns, and go on behind it."""
        character = self.peek()
        self._place += len(character)
        return character

    def value(self) -> Any:
        """Return the value that begins at the next character."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._place)
            except json.JSONDecodeError as error:
                if not (self._is_cut(error) and self._read_more()):
                    raise BadTextError(f"it is not JSON: {error.msg.removesuffix(' at')}") from error
            except RecursionError as error:
                raise BadTextError("its lists and objects are nested too deeply") from error
            else:
                if end == len(self._buffer) and self._read_more():
                    continue  # a number may go on
                self._place = end
                return value

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Return whether the value may only seem wrong because the buffer ends: at most a -Infinity before its end."""
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._buffer) - len("-Infinity")

    def _read_more(self) -> bool:
        """Read as much again as is left, so that a long value is not parsed over and over."""
        left = self._buffer[self._place :]
        block = self._file.read(max(self._BLOCK_CHARACTERS, len(left)))
        self._buffer, self._place = left + block, 0
        return bool(block)
