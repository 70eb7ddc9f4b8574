"""Documents from text files, from whatever ``datasets`` loads, and from the Hugging Face hub, in bounded memory.

Long documents come in pieces, so that one of them neither fills the memory nor keeps a single worker busy.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

from megalibi.config import ConfigError

TextUnit = Literal["document", "line", "paragraph"]

PIECE_CHARACTERS = 65_536
"""Documents longer than this are cut, where they have a space to cut at."""

_TEXT_SUFFIXES = (".txt", ".tokens")  # WikiText's files are called wiki.train.tokens
_BUILDERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""How compressed files are opened, by suffix."""
_HUB_NAME = re.compile(r"(?P<path>[\w.-]+(/[\w.-]+)?)(:(?P<name>[^@]+))?(@(?P<split>.+))?")
_ROWS = 64  # rows that are turned into Python strings at a time


class Piece(NamedTuple):
    """A piece of a document; the document ends with the piece that says so."""

    text: str
    ends_document: bool


def iterate_pieces(
    inputs: Iterable[str], *, text_key: str = "text", text_unit: TextUnit = "document", keep_empty: bool = False
) -> Iterator[Piece]:
    """Yield the documents of several inputs, in order.

    Args:
        inputs: Files (.txt, .tokens, .json, .jsonl, .ndjson, .csv, .parquet, also compressed), folders that
            ``datasets`` can load, or hub names: ORG/NAME[:CONFIG][@SPLIT].
        text_key: The column that holds the text; .txt and .tokens files have none.
        text_unit: What is one document in such a file: the whole file, a line, or a paragraph (blank lines between).
        keep_empty: Yield empty rows and lines too, for whom line ends are tokens.

    Raises:
        ConfigError: If an input is missing, not readable, or has no such column.
    """
    for name in inputs:
        suffix = format_suffix(name)
        if suffix in _TEXT_SUFFIXES:
            yield from _read_text_file(name, text_unit, keep_empty)
        else:
            yield from _read_dataset(name, suffix, text_key, keep_empty)


def format_suffix(name: str) -> str:
    """Return the suffix that tells an input's format, without that of its compression.

    Raises:
        ConfigError: If this is the name of a file that does not exist, or of a file in no known format.
    """
    path = Path(name)
    suffix = (path.with_suffix("") if path.suffix in OPENERS else path).suffix
    known = suffix in _TEXT_SUFFIXES or suffix in _BUILDERS
    if known and not path.is_file():
        raise ConfigError(f"{name}: no such file")
    if path.is_file() and not known:
        allowed = ", ".join([".txt", *_BUILDERS, ".tokens"])
        raise ConfigError(f"{name}: format not known from its name; {allowed} are read, also compressed")
    if not known and not path.is_dir() and not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"{name}: neither a file, nor a folder, nor a hub name ORG/NAME[:CONFIG][@SPLIT]")
    return suffix if known else ""


def cut_at_spaces(text: str, max_characters: int) -> Iterator[str]:
    """Cut a text before spaces that follow something else; the pieces are as long as allowed, or have no such space.

    No piece of a word-wise tokenizer reaches across these places, so the pieces' ids are the text's ids.
    """
    start = 0
    while len(text) - start > max_characters:
        cut = _last_cut(text, start, start + max_characters)
        if cut == start:
            cut = _first_cut(text, start + max_characters)
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def _last_cut(text: str, start: int, stop: int) -> int:
    cut = text.rfind(" ", start + 1, stop)
    while cut > start and text[cut - 1] == " ":
        cut -= 1
    return max(cut, start)


def _first_cut(text: str, start: int) -> int:
    while text[start - 1] == " " and start < len(text):
        start += 1
    cut = text.find(" ", start)
    return len(text) if cut < 0 else cut


def _document_pieces(text: str, keep_empty: bool = False) -> Iterator[Piece]:
    pieces = cut_at_spaces(text, PIECE_CHARACTERS)
    held = next(pieces, None)
    for piece in pieces:
        assert held is not None
        yield Piece(held, False)
        held = piece
    if held is not None or keep_empty:
        yield Piece(held or "", True)


def _read_text_file(name: str, text_unit: TextUnit, keep_empty: bool) -> Iterator[Piece]:
    readers: dict[str, Callable[[TextIO], Iterator[Piece]]] = {
        "document": _whole_file,
        "line": functools.partial(_lines, keep_empty=keep_empty),
        "paragraph": _paragraphs,
    }
    try:
        # newline="": line ends are text, and come back as they were.
        with OPENERS.get(Path(name).suffix, open)(name, "rt", encoding="utf-8", newline="") as file:
            yield from readers[text_unit](file)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start} of a block)") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ConfigError(f"{name}: cannot be read: {error}") from error


def _whole_file(file: TextIO) -> Iterator[Piece]:
    held = ""
    while block := file.read(4 * PIECE_CHARACTERS):
        pieces = list(cut_at_spaces(held + block, PIECE_CHARACTERS))
        held = pieces.pop()
        for piece in pieces:
            yield Piece(piece, False)
    if held:
        yield Piece(held, True)


def _lines(file: TextIO, *, keep_empty: bool) -> Iterator[Piece]:
    for line in file:
        yield from _document_pieces(line.rstrip("\r\n"), keep_empty)


def _paragraphs(file: TextIO) -> Iterator[Piece]:
    lines: list[str] = []
    for line in file:
        if line.strip():
            lines.append(line)
        elif lines:
            yield from _document_pieces("".join(lines).rstrip("\r\n"))
            lines = []
    yield from _document_pieces("".join(lines).rstrip("\r\n"))


def _read_dataset(name: str, suffix: str, text_key: str, keep_empty: bool) -> Iterator[Piece]:
    import datasets  # not at the top: every worker imports this module, and this takes a second
    import pyarrow

    try:
        for table in _load(name, suffix, text_key).with_format("arrow").iter(batch_size=_ROWS):
            if text_key not in table.column_names:
                raise _no_column(name, text_key, table.column_names)
            for value in table.column(text_key):
                text = value.as_py()
                if not isinstance(text, str | None):
                    raise ConfigError(
                        f"{name}: column {text_key!r} holds {value.type}, not text; choose with --text-key"
                    )
                yield from _document_pieces(text or "", keep_empty)
    except ConfigError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"{name}: cannot be read: {error}") from error


def _load(name: str, suffix: str, text_key: str) -> Any:
    import datasets
    import pyarrow.parquet

    if suffix:
        options = {}
        if suffix == ".parquet" and Path(name).suffix == suffix:
            columns = pyarrow.parquet.read_schema(name).names
            if text_key not in columns:
                raise _no_column(name, text_key, columns)
            options["columns"] = [text_key]  # the other columns are not even read
        return datasets.load_dataset(_BUILDERS[suffix], data_files=[name], split="train", streaming=True, **options)
    if Path(name).is_dir():
        return datasets.load_dataset(name, split="train", streaming=True)
    match = _HUB_NAME.fullmatch(name)
    assert match is not None
    return datasets.load_dataset(match["path"], match["name"], split=match["split"] or "train", streaming=True)


def _no_column(name: str, text_key: str, columns: Iterable[str]) -> ConfigError:
    return ConfigError(f"{name}: no column {text_key!r}; choose one of {', '.join(columns)} with --text-key")
