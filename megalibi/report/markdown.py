"""Markdown for pages of results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def format_table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> Iterator[str]:
    """Yield the lines of a Markdown table.

    Args:
        heads: The heads of the columns.
        rows: The cells of each row.
        left: Number of columns that are flush left, from the first on; the others are numbers, flush right.
    """
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * left + "--:|" * (len(heads) - left)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def format_page(sections: Iterable[tuple[str, Iterable[str]]]) -> str:
    """Return a Markdown page.

    Args:
        sections: Each has its heading, with the ``#``, and its lines. A section without a line is left out.
    """
    written = [(heading, lines) for heading, body in sections if (lines := list(body))]
    return "\n".join(f"{heading}\n\n" + "\n".join(lines) + "\n" for heading, lines in written)
