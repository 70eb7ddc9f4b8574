"""The texts of CSV rows. Every field is text: NA and 007 are no more than letters and digits."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from megalibi.data.text.records.common import BadRecord, Record, find_column, not_utf8
from megalibi.data.text.sources import BROKEN_FILE, Source, broken
from megalibi.errors import DataError

_MAX_FIELD_CHARACTERS = 2**31 - 1


def read_csv(source: Source, text_key: str) -> Iterator[Record]:
    """Yield the text of each row; the first row names the columns."""
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    rows: Any = None
    try:
        with source.open() as file:
            rows = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
            header: list[str] = next((row for row in rows if row), [])
            column = find_column(source.name, header, text_key) if header else 0
            while True:
                before = rows.line_num
                row = next(rows, None)
                if row is None:
                    return
                if len(row) == len(header):
                    yield row[column]
                elif row:
                    reason = f"it has {len(row)} fields, and the header has {len(header)}"
                    yield BadRecord(f"line {before + 1}", reason)
    except csv.Error as error:  # where the next row would begin is not known
        raise DataError(f"{source.name}, line {rows.line_num}: it is not CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise not_utf8(source) from error
    except BROKEN_FILE as error:
        raise broken(source, error, f"line {rows.line_num}" if rows is not None and rows.line_num else "") from error
