"""Cutting long texts into pieces, so that none of them fills the memory or keeps a single worker busy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

Cut = Callable[[str, int], Iterator[str]]
"""Cuts a text into pieces of about so many characters at most; joined, they are the text."""
FindCut = Callable[[str, int, int], int]
"""Returns a place in (start, stop] at which the text may be cut, or ``start`` if there is none."""


def cut_at_spaces(text: str, max_characters: int, find_cut: FindCut | None = None) -> Iterator[str]:
    """Cut a text before spaces that follow something else.

    No piece of a word-wise tokenizer reaches across these places, so the pieces' ids are the text's ids.

    Args:
        text: What to cut.
        max_characters: Pieces are as long at most, unless there is no place to cut at in so many characters.
        find_cut: Is asked for another place where there is no such space, as in Chinese; None: the piece is longer.
    """
    start = 0
    while len(text) - start > max_characters:
        stop = start + max_characters
        cut = _last_cut(text, start, stop)
        if cut == start and find_cut is not None:
            cut = find_cut(text, start, stop)
        if cut == start:
            cut = _first_cut(text, stop)
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def cut_anywhere(text: str, max_characters: int) -> Iterator[str]:
    """Cut a text before spaces, else after line ends, else between any two characters: for whom pieces are samples."""
    return cut_at_spaces(text, max_characters, _after_a_line_end)


def _after_a_line_end(text: str, start: int, stop: int) -> int:
    line_end = text.rfind("\n", start, stop)
    return stop if line_end < 0 else line_end + 1


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
