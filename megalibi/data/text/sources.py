"""Which files an input names: the file itself, all files of a folder, or nothing on this machine (a hub name).

Names are taken as they are: ``[``, ``*`` and ``?`` in them are characters like others.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast

from megalibi.data.text.members import MemberReader
from megalibi.errors import ConfigError, DataError
from megalibi.log import get_logger

TEXT_FORMATS = (".txt", ".tokens")
"""The endings of files of plain text; WikiText's files are called wiki.train.tokens."""
RECORD_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow", ".feather")
"""The endings of files of records, in which a field holds the text."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_WHOLE_FORMATS = (".parquet", ".arrow", ".feather")
"""They are compressed inside, and read from any place: not as a stream."""
_FORMATS_IN_WORDS = (
    ".txt, .tokens, .json, .jsonl, .ndjson, .csv (also with .gz, .bz2, .xz, .zst), .parquet, .arrow, .feather"
)
INPUT_HELP = (
    f"a file ({_FORMATS_IN_WORDS}), a folder of such files, or a dataset "
    "on the hub, ORG/NAME[:CONFIG][@SPLIT]; a name is taken as it is, whatever signs are in it"
)
"""What the commands say of --input."""
_SAVED_BY_DATASETS = ("state.json", "dataset_dict.json")
RECORD_HEAD = b'{\n "format": "megalibi token file'
"""How PREFIX.json begins, which the preprocessing writes beside a token file."""
_HUB_NAME = re.compile(r"(?P<path>[\w.-]+(/[\w.-]+)?)(:(?P<name>[^@]+))?(@(?P<split>.+))?")
_NAMES_SAID = 5
_BUFFER_BYTES = 1 << 18
_LOGGER = get_logger(__name__)

BROKEN_FILE = (OSError, EOFError, lzma.LZMAError, zlib.error)
"""What reading a damaged or truncated compressed file raises."""


class Source(NamedTuple):
    """A thing to read."""

    name: str
    """Its path, or what the user called it."""
    format: str
    """Suffix that tells the format; empty: ``datasets`` reads it."""

    @property
    def compression(self) -> str:
        """Return the suffix of a compressed file, or nothing."""
        suffix = Path(self.name).suffix.lower()
        return suffix if self.format and suffix in COMPRESSIONS else ""

    def open(self) -> BinaryIO:
        """Return its bytes, decompressed; a file without bytes has none, however it is compressed."""
        if os.path.getsize(self.name) == 0:
            return io.BytesIO()
        openers: dict[str, Callable[[str], Any]] = {
            ".gz": gzip.open,
            ".bz2": partial(MemberReader, make=bz2.BZ2Decompressor),
            ".xz": partial(MemberReader, make=lzma.LZMADecompressor),
        }
        opener = openers.get(self.compression, _open_zst if self.compression else io.FileIO)
        return cast(BinaryIO, io.BufferedReader(opener(self.name), _BUFFER_BYTES))

    def hub_name(self) -> tuple[str, str | None, str]:
        """Return path, configuration and split of a hub name."""
        match = _HUB_NAME.fullmatch(self.name)
        assert match is not None, self.name
        return match["path"], match["name"], match["split"] or "train"


def _open_zst(name: str) -> Any:
    import pyarrow  # here, because workers of the preprocessing read nothing

    return pyarrow.input_stream(name, compression="zstd")


def find_sources(inputs: Iterable[str], *, say_left_out: bool = True) -> list[Source]:
    """Return what to read for several inputs, in order, after a look at each file.

    Args:
        inputs: Files, folders, or hub names ORG/NAME[:CONFIG][@SPLIT]. Of a folder all files are read whose format is
            known from their names, in the order of their names, those of its subfolders too; ``datasets`` reads the
            folders that it saved itself.
        say_left_out: Whether the files of a folder that are in no known format are said.

    Raises:
        ConfigError: An input's name is empty.
        DataError: An input is missing, cannot be opened, or is in no known format.
    """
    sources = [source for name in inputs for source in _find(name, say_left_out)]
    for source in sources:
        if source.format:
            _check_opens(source)
    return sources


def _find(name: str, say_left_out: bool) -> Iterator[Source]:
    if not name:
        raise ConfigError("--input='': must be the name of a file, of a folder or of a dataset on the hub")
    try:
        path = Path(name)
        kind = "folder" if path.is_dir() else "file" if path.exists() else ""
    except (OSError, ValueError) as error:  # a name that is too long, for example
        shown = name if len(name) <= 100 else f"{name[:100]}..."
        raise DataError(f"{shown}: cannot be read: {_reason(error)}") from error
    file_format = find_format(name)
    if kind == "folder":
        yield from _find_in_folder(path, say_left_out)
    elif kind == "file" and file_format is None:
        raise DataError(f"{name}: its name ends in no known format; {_FORMATS_IN_WORDS} can be read")
    elif kind == "file":
        yield Source(name, file_format or "")
    elif file_format is not None:
        raise DataError(f"{name}: no such file" + _about_patterns(name))
    elif not _HUB_NAME.fullmatch(name):
        raise DataError(
            f"{name}: neither a file, nor a folder, nor a hub name ORG/NAME[:CONFIG][@SPLIT]{_about_patterns(name)}"
        )
    else:
        yield Source(name, "")


def find_format(name: str) -> str | None:
    """Return the suffix that tells a file's format, without that of its compression; None: not known."""
    path = Path(name)
    suffix = path.suffix.lower()
    is_compressed = suffix in COMPRESSIONS
    if is_compressed:
        suffix = path.with_suffix("").suffix.lower()
    if suffix in _WHOLE_FORMATS:
        return None if is_compressed else suffix
    return suffix if suffix in TEXT_FORMATS + RECORD_FORMATS else None


def _about_patterns(name: str) -> str:
    return "; names are taken as they are, patterns are the shell's: leave the quotes away" if "*" in name else ""


def _find_in_folder(folder: Path, say_left_out: bool) -> Iterator[Source]:
    if any((folder / name).is_file() for name in _SAVED_BY_DATASETS):
        yield Source(str(folder), "")
        return
    sources, left_out = [], []
    for path in _walk(folder):
        file_format = find_format(path.name)
        if file_format is None or _is_about_others(path):
            left_out.append(str(path.relative_to(folder)))
        else:
            sources.append(Source(str(path), file_format))
    if not sources:
        raise DataError(f"{folder}: no file in this folder is in a known format; {_FORMATS_IN_WORDS} can be read")
    if left_out and say_left_out:
        more = len(left_out) - _NAMES_SAID
        names = ", ".join(left_out[:_NAMES_SAID]) + (f" and {more} more" if more > 0 else "")
        _LOGGER.warning("%s: left out, for their names or what they hold are not those of texts: %s", folder, names)
    yield from sources


def _is_about_others(path: Path) -> bool:
    """Return whether a file describes the files beside it: what ``datasets`` or the preprocessing wrote of them."""
    if path.name in ("dataset_info.json", "dataset_infos.json"):
        return True
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(RECORD_HEAD)) == RECORD_HEAD


def _walk(folder: Path) -> list[Path]:
    """Return the files below a folder in the order of their names, hidden ones left out, and none by two names."""
    found: dict[str, Path] = {}  # by what a name leads to; names in order, so that the first one stays
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            seen.add(real)
            for name in sorted(names):
                if not name.startswith("."):
                    found.setdefault(os.path.realpath(os.path.join(root, name)), Path(root, name))
    return sorted(found.values())


def _refuse_folder(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _check_opens(source: Source) -> None:
    """Read the first byte: what is no file, or in another compression, shows before hours of work."""
    try:
        if not Path(source.name).is_file():
            raise DataError(f"{source.name}: not a regular file")
        with source.open() as file:
            file.read(1)
    except BROKEN_FILE as error:
        raise broken(source, error) from error


def broken(source: Source, error: BaseException, place: str = "") -> DataError:
    """Return the error for a file that cannot be read, or not past some place."""
    past = f" past {place}" if place else ""
    return DataError(f"{source.name}: cannot be read{past}: {_reason(error)}; copy it or make it again")


def _reason(error: BaseException) -> str:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(reason.split()).rstrip(".")
