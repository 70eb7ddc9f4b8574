"""How much text inputs hold, without reading them: what a progress bar needs to tell the time left."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from megalibi.data.text.sources import BROKEN_FILE, Source, find_sources

_TYPICAL_COMPRESSION = 3.0  # of English text by gzip
_SAMPLE_LINES = 64
_MAX_LINE_BYTES = 1 << 20


def estimate_text_bytes(inputs: Iterable[str], text_key: str = "text") -> int | None:
    """Return about how many bytes of text inputs hold, or None if that cannot be told (what ``datasets`` reads).

    A file that cannot be read counts as nothing here: reading it will say what is wrong with it.

    Raises:
        DataError: If an input is missing or in no known format.
    """
    total = 0
    for source in find_sources(inputs, say_left_out=False):
        if not source.format:
            return None
        try:
            total += _estimate_file(source, text_key)
        except (*BROKEN_FILE, ValueError, AttributeError, RecursionError):
            continue
    return total or None


def _estimate_file(source: Source, text_key: str) -> int:
    path = Path(source.name)
    size = float(path.stat().st_size)
    if source.format == ".parquet":
        return _parquet_column_bytes(path, text_key)
    if source.compression:
        size *= _TYPICAL_COMPRESSION
    if source.format in (".jsonl", ".ndjson", ".json"):
        size *= _text_share(source, text_key)
    return int(size)


def _parquet_column_bytes(path: Path, text_key: str) -> int:
    import pyarrow.parquet  # here, because workers of the preprocessing never need it

    metadata = pyarrow.parquet.read_metadata(path)
    columns = [
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_key)


def _text_share(source: Source, text_key: str) -> float:
    """Return which part of the first lines of a JSON-lines file is text."""
    line_bytes = text_bytes = 0
    with source.open() as file:
        for line in islice(iter(lambda: file.readline(_MAX_LINE_BYTES), b""), _SAMPLE_LINES):
            line_bytes += len(line)
            text_bytes += len(str(json.loads(line).get(text_key) or "").encode())
    return text_bytes / max(line_bytes, 1)
