"""Markdown, as pages of results are written in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def format_table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> Iterator[str]:
    """Yield the lines of a Markdown table.

    Args:
        heads: Of the columns.
        rows: Of cells.
        left: So many columns are flush left; the others are numbers.
    """
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * left + "--:|" * (len(heads) - left)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
