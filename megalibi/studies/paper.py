"""The paper's numbers, all of its tables and Figures 5 to 7, and sentences that studies quote; paper.json has them.

Each has its place in the paper. Cells are as printed, but 28.3k is 28300; methods have our names, and the models of
others in Tables 7 and 10 those that the paper has. Points of figures are digitised.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any

Cell = str | float | None
"""A number, a method's name, or None where the paper's table has an empty cell."""
CurvePoints = tuple[tuple[float, float], ...]
"""The points (x, y) of one curve of a figure, by rising x."""

SOURCE = "arXiv:2108.12409v2"
EXTRAPOLATION_TABLES = {512: 2, 1024: 3, 3072: 4}
"""Training length -> number of the table with four methods' nonoverlapping perplexities at many lengths."""
SLIDING_TABLES = {"sinusoidal": 13, "t5_bias": 14, "alibi": 15}
"""Position method -> number of the table with its sliding perplexities, stride 1. The paper has none for rotary."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the paper."""

    number: int
    """The table's number in the paper."""
    page: int
    """Its page in the PDF."""
    caption: str
    """What the table shows, in our words."""
    columns: tuple[str, ...]
    """Names of the columns; a column named as a length holds the perplexity at that length, and those named validation
    and test the perplexities of these texts."""
    rows: tuple[tuple[Cell, ...], ...]
    """The cells of each row, in the order of the columns; the rows in the paper's order."""

    @property
    def source(self) -> str:
        """The table's place in the paper, for a caption."""
        return f"{SOURCE}, Table {self.number}, p. {self.page}"

    def row(self, **keys: Cell) -> Mapping[str, Any]:
        """Return the first row that has these cells, given by column.

        Raises:
            KeyError: No row has them.
        """
        for cells in self.rows:
            row = dict(zip(self.columns, cells, strict=True))
            if all(row[name] == value for name, value in keys.items()):
                return row
        raise KeyError(f"Table {self.number} has no row with {keys}")


@dataclass(frozen=True, kw_only=True)
class Quote:
    """A sentence of the paper."""

    text: str
    """The sentence, word for word."""
    source: str
    """The section and the page of the sentence."""
    value: float | None = None
    """The number that the sentence states, if it states one."""


def get_table(number: int) -> Table:
    """Return a table of the paper.

    Args:
        number: 1 (speed and memory), 2 to 5 and 13 to 15 (perplexity by length on WikiText-103), 6 and 7 (its test
            set), 8 to 10 (Toronto BookCorpus), or 11 and 12 (1.3B models).

    Raises:
        KeyError: The paper has no such table.
    """
    fields = _read()["tables"][str(number)]
    rows = tuple(tuple(row) for row in fields["rows"])
    return Table(
        number=number, page=fields["page"], caption=fields["caption"], columns=tuple(fields["columns"]), rows=rows
    )


def get_curves(figure: str) -> Mapping[str, CurvePoints]:
    """Return the digitised curves of a figure: ``METHOD_TRAININGLENGTH`` -> points, in Figure 7 ``METHOD`` -> points.

    Args:
        figure: "5 left" or "5 right" (points are GPU hours and perplexity), "6" (evaluation length and perplexity), or
            "7" (training length and words per second of training).

    Raises:
        KeyError: It is another figure.
    """
    series = _read()["figures"][figure]["series"]
    return {name: tuple((x, y) for x, y in points) for name, points in series.items()}


def get_quote(name: str) -> Quote:
    """Return a sentence of the paper.

    Raises:
        KeyError: No study quotes it.
    """
    return Quote(**_read()["quotes"][name])


def extrapolation(method: str, train_length: int, protocol: str) -> dict[int, float]:
    """Return the paper's WikiText-103 perplexities by evaluation length; the dict is empty if it has none.

    Args:
        method: A position method.
        train_length: 512, 1024 or 3072.
        protocol: nonoverlapping (Tables 2 to 4), or sliding with stride 1 (Tables 13 to 15).
    """
    if protocol == "nonoverlapping":
        table = get_table(EXTRAPOLATION_TABLES[train_length])
        if method not in table.columns:
            return {}
        column = table.columns.index(method)
        cells = {row[0]: row[column] for row in table.rows}
    elif method in SLIDING_TABLES:
        row = get_table(SLIDING_TABLES[method]).row(train_length=train_length)
        cells = {int(name): cell for name, cell in row.items() if name.isdecimal()}
    else:
        return {}
    return {int(length): float(cell) for length, cell in cells.items() if cell is not None}  # type: ignore[arg-type]


def update_rate_gain() -> float:
    """Return by what share ALiBi at 1,024 makes more updates an hour than sinusoidal at 2,048 (Table 11): 0.131."""
    table = get_table(11)
    alibi = table.row(method="alibi", train_length=1024)["updates_thousands"]
    return alibi / table.row(method="sinusoidal", train_length=2048)["updates_thousands"] - 1.0


def memory_saving() -> float:
    """Return by what share ALiBi at 1,024 takes less memory than sinusoidal at 2,048 (Table 11): 0.106."""
    table = get_table(11)
    alibi = table.row(method="alibi", train_length=1024)["memory_gb"]
    return 1.0 - alibi / table.row(method="sinusoidal", train_length=2048)["memory_gb"]


@functools.cache
def _read() -> Mapping[str, Any]:
    text = (resources.files("megalibi.studies") / "paper.json").read_text(encoding="utf-8")
    return MappingProxyType(json.loads(text))
