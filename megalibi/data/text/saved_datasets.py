"""The texts of what ``datasets`` alone can read: datasets of the Hugging Face hub, and folders that it saved itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalibi.data.text.records.common import Record
from megalibi.data.text.records.tables import check_column, read_rows, validated
from megalibi.data.text.sources import Source
from megalibi.errors import DataError, UserError

_ROWS = 64  # that are decoded at a time


def read_dataset(source: Source, text_key: str) -> Iterator[Record]:
    """Yield the texts of a dataset, one a row.

    Args:
        source: A folder that ``datasets`` saved, or a hub name.
        text_key: The column that holds the text.

    Raises:
        DataError: The dataset cannot be loaded or read, has no such column, or another type stands in it.
    """
    columns, number = _columns(source, text_key), 0
    while True:
        try:  # around their code alone: it raises errors of any library below it
            column = next(columns, None)
        except UserError:
            raise
        except Exception as error:
            what = "" if Path(source.name).is_dir() else "no file or folder here, and of the hub it "
            raise DataError(f"{source.name}: {what}cannot be read: {error or type(error).__name__}") from error
        if column is None:
            return
        yield from read_rows(column, number + 1)
        number += len(column)


def _columns(source: Source, text_key: str) -> Iterator[Any]:
    for table in _load(source).with_format("arrow").iter(batch_size=_ROWS):
        index = check_column(source.name, table.schema, text_key)
        yield validated(table.column(index))


def _load(source: Source) -> Any:
    import datasets  # not at the top: every worker imports this package, and this takes a second

    if not Path(source.name).is_dir():
        import huggingface_hub

        huggingface_hub.utils.logging.set_verbosity_error()  # its retries are many lines, and then there is an error
        path, configuration, split = source.hub_name()
        return datasets.load_dataset(path, configuration, split=split, streaming=True)
    loaded = datasets.load_from_disk(source.name)
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if "train" not in loaded:
        raise DataError(f"{source.name}: there is no split train; give the folder of one of {', '.join(loaded)}")
    return loaded["train"]
