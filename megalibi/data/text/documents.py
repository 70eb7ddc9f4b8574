"""Documents from local files, from folders and from the Hugging Face hub, in bounded memory.

Long documents come in pieces, so that one of them neither fills the memory nor keeps a single worker busy.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

from megalibi.data.text.cutting import Cut, cut_at_spaces
from megalibi.data.text.records import BadRecord, Record, not_utf8, read_records
from megalibi.data.text.saved_datasets import read_dataset
from megalibi.data.text.sources import BROKEN_FILE, TEXT_FORMATS, Source, broken, find_sources
from megalibi.errors import DataError
from megalibi.log import get_logger

TextUnit = Literal["document", "line", "paragraph"]

PIECE_CHARACTERS = 65_536
"""Documents longer than this are cut, where they have a place to cut at."""
_BAD_RECORDS_SAID = 10
_BAD_RECORDS_KEPT = 10_000
_LOGGER = get_logger(__name__)


class Piece(NamedTuple):
    """A piece of a document."""

    text: str
    """The characters of the piece."""
    ends_document: bool
    """Whether the document ends with this piece."""


@dataclass(kw_only=True)
class SourceCount:
    """What was read of a source so far."""

    source: Source
    """The file or dataset that is counted."""
    documents: int = 0
    """The number of documents that were read."""
    empty: int = 0
    """The number of records, lines or files without text; they are left out."""
    num_bad_records: int = 0
    """The number of records that are left out because their text cannot be read."""
    bad_records: list[str] = field(default_factory=list)
    """Where the first of the bad records stand, and what is wrong with them."""

    def to_dict(self) -> dict[str, Any]:
        """Return the count as PREFIX.json keeps it."""
        path = Path(self.source.name)
        return {
            "name": self.source.name,
            "size_bytes": path.stat().st_size if path.is_file() else None,
            "documents": self.documents,
            "empty": self.empty,
            "num_bad_records": self.num_bad_records,
            "bad_records": self.bad_records,
        }


class DocumentReader:
    """The documents of several inputs, in order, in pieces; and the count of what was left out.

    All inputs are looked at when it is made, so that a wrong name shows before hours of work.

    Args:
        inputs: Files in a format of megalibi.data.text.sources, folders, or hub names: ORG/NAME[:CONFIG][@SPLIT]. Names
            are taken as they are.
        text_key: The field that holds the text; .txt and .tokens files have none.
        text_unit: What is one document in such a file: the whole file, a line, or a paragraph (blank lines between).
        keep_empty: Yield empty records and lines too; a tokenizer for which line ends are tokens needs them.
        skip_bad_records: Count and list records whose text cannot be had; without it the first of them is an error.
        cut: How long documents are cut.

    Raises:
        DataError: An input is missing, cannot be opened, or is in no known format.
    """

    def __init__(
        self,
        inputs: Iterable[str],
        *,
        text_key: str = "text",
        text_unit: TextUnit = "document",
        keep_empty: bool = False,
        skip_bad_records: bool = False,
        cut: Cut = cut_at_spaces,
    ) -> None:
        self.counts = [SourceCount(source=source) for source in find_sources(inputs)]
        self._text_key = text_key
        self._text_unit = text_unit
        self._keep_empty = keep_empty
        self._skip_bad_records = skip_bad_records
        self._cut = cut

    def __iter__(self) -> Iterator[Piece]:
        """Yield the pieces of all documents.

        Raises:
            DataError: A file is damaged, not in UTF-8, or has no such field; or a record is bad.
        """
        for count in self.counts:
            if count.source.format in TEXT_FORMATS:
                yield from self._read_text_file(count)
            else:
                yield from self._read_records(count)

    def describe_left_out(self) -> str:
        """Return in words how much was left out; an empty string if nothing was."""
        empty = sum(count.empty for count in self.counts)
        bad = sum(count.num_bad_records for count in self.counts)
        parts = [f"{number:,} {kind}" for number, kind in ((empty, "without text"), (bad, "bad records")) if number]
        return f"left out: {', '.join(parts)}" if parts else ""

    def _read_records(self, count: SourceCount) -> Iterator[Piece]:
        read: Callable[[Source, str], Iterator[Record]] = read_records if count.source.format else read_dataset
        for record in read(count.source, self._text_key):
            if isinstance(record, BadRecord):
                self._take_bad(count, record)
            else:
                yield from self._pieces(record or "", count)

    def _take_bad(self, count: SourceCount, record: BadRecord) -> None:
        line = f"{count.source.name}, {record.place}: {record.reason}"
        if not self._skip_bad_records:
            raise DataError(f"{line}; correct it, or leave such records out with --skip-bad-records")
        count.num_bad_records += 1
        if count.num_bad_records <= _BAD_RECORDS_KEPT:
            count.bad_records.append(f"{record.place}: {record.reason}")
        if count.num_bad_records <= _BAD_RECORDS_SAID:
            more = ", and so are more of them" if count.num_bad_records == _BAD_RECORDS_SAID else ""
            _LOGGER.warning("%s; left out%s", line, more)

    def _read_text_file(self, count: SourceCount) -> Iterator[Piece]:
        readers: dict[str, Callable[[TextIO, SourceCount], Iterator[Piece]]] = {
            "document": self._whole_file,
            "line": self._lines,
            "paragraph": self._paragraphs,
        }
        try:
            # newline="\n": line ends are text and come back as they were, and a lone \r ends no line.
            with io.TextIOWrapper(count.source.open(), encoding="utf-8-sig", newline="\n") as file:
                yield from readers[self._text_unit](file, count)
        except UnicodeDecodeError as error:
            raise not_utf8(count.source) from error
        except BROKEN_FILE as error:
            raise broken(count.source, error) from error

    def _whole_file(self, file: TextIO, count: SourceCount) -> Iterator[Piece]:
        held = ""
        while block := file.read(4 * PIECE_CHARACTERS):
            pieces = list(self._cut(held + block, PIECE_CHARACTERS))
            held = pieces.pop()
            yield from (Piece(piece, False) for piece in pieces)
        if held:
            count.documents += 1
            yield Piece(held, True)
        else:
            count.empty += 1

    def _lines(self, file: TextIO, count: SourceCount) -> Iterator[Piece]:
        for line in file:
            yield from self._pieces(line.removesuffix("\n").removesuffix("\r"), count)

    def _paragraphs(self, file: TextIO, count: SourceCount) -> Iterator[Piece]:
        lines: list[str] = []
        for line in file:
            if line.strip():
                lines.append(line)
            elif lines:
                yield from self._pieces("".join(lines).rstrip("\r\n"), count)
                lines = []
        if lines:
            yield from self._pieces("".join(lines).rstrip("\r\n"), count)

    def _pieces(self, text: str, count: SourceCount) -> Iterator[Piece]:
        """Yield the pieces of one document."""
        if not text and not self._keep_empty:
            count.empty += 1
            return
        count.documents += 1
        pieces = self._cut(text, PIECE_CHARACTERS)
        held = next(pieces, "")
        for piece in pieces:
            yield Piece(held, False)
            held = piece
        yield Piece(held, True)


def join_pieces(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Put the pieces of each document together again, for a tokenizer that cannot take a document in pieces."""
    texts: list[str] = []
    for piece in pieces:
        texts.append(piece.text)
        if piece.ends_document:
            yield Piece("".join(texts), True)
            texts = []
