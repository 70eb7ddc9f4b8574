"""The texts of records in local files: one field is read, and the others may be of any kind.

What the fields of a file's first records are says nothing about the next ones, so no types are inferred: each record
is looked at by itself, and one that holds no text is named by its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megalibi.data.text.records.common import BadRecord, Record, not_utf8
from megalibi.data.text.records.csv_rows import read_csv
from megalibi.data.text.records.json_text import read_json, read_json_lines
from megalibi.data.text.records.tables import read_tables
from megalibi.data.text.sources import Source

__all__ = ["BadRecord", "Record", "not_utf8", "read_records"]

_READERS: dict[str, Callable[[Source, str], Iterator[Record]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_tables,
    ".arrow": read_tables,
    ".feather": read_tables,
}


def read_records(source: Source, text_key: str) -> Iterator[Record]:
    """Yield the text of each record of a file in one of RECORD_FORMATS.

    Args:
        source: The file.
        text_key: The field that holds the text.

    Raises:
        DataError: The file is damaged or in another format, or no record has such a field.
    """
    return _READERS[source.format](source, text_key)
