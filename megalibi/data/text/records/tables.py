"""The texts of a column in Parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megalibi.data.text.records.common import BadRecord, Record, find_column
from megalibi.data.text.sources import BROKEN_FILE, Source, broken
from megalibi.errors import DataError

_ROWS = 64  # that are decoded at a time


def read_tables(source: Source, text_key: str) -> Iterator[Record]:
    """Yield the text of each row of a Parquet or Arrow file; the other columns are not even read."""
    import pyarrow  # here, because workers of the preprocessing read nothing

    number = 0
    try:
        for column in _columns(source, text_key):
            yield from read_rows(column, number + 1)
            number += len(column)
    except (*BROKEN_FILE, pyarrow.ArrowException) as error:
        raise broken(source, error, f"row {number}" if number else "") from error


def read_rows(column: Any, first_row: int) -> Iterator[Record]:
    """Yield the texts of an array, of which the first is in this row of its file."""
    for row, value in enumerate(column, start=first_row):
        try:
            yield value.as_py()
        except UnicodeDecodeError as error:
            yield BadRecord(f"row {row}", f"it is not UTF-8 text ({error.reason} at byte {error.start + 1})")


def _columns(source: Source, text_key: str) -> Iterator[Any]:
    """Yield arrays of the text's column."""
    import pyarrow
    import pyarrow.parquet

    if source.format == ".parquet":
        # Buffered: a column is read page by page, where it would be a row group at once.
        with pyarrow.parquet.ParquetFile(source.name, buffer_size=1 << 20) as file:
            check_column(source.name, file.schema_arrow, text_key)
            for batch in file.iter_batches(_ROWS, columns=[text_key]):
                yield batch.column(batch.schema.names.index(text_key))
        return
    with pyarrow.memory_map(source.name) as mapped:
        try:
            reader: Any = pyarrow.ipc.open_file(mapped)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:  # the other of the two formats, in which ``datasets`` writes
            batches = reader = pyarrow.ipc.open_stream(mapped)
        index = check_column(source.name, reader.schema, text_key)
        for batch in batches:
            yield validated(batch.column(index))


def validated(column: Any) -> Any:
    """Return a column whose offsets stay within it: reading one of a damaged file would end the process.

    Text that is not UTF-8 is left to whoever reads the rows. Parquet's reader makes its arrays itself.
    """
    import pyarrow

    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid as error:  # offsets are looked at first
        if "utf8" not in str(error).lower():
            raise
    return column


def check_column(name: str, schema: Any, text_key: str) -> int:
    """Return the place of the text's column.

    Raises:
        DataError: There is no such column, there are several, or it holds something other than text.
    """
    import pyarrow.types as types

    index = find_column(name, schema.names, text_key)
    kind = schema.field(index).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)):
        raise DataError(f"{name}: column {text_key!r} holds {kind}, not text; choose with --text-key")
    return index
