"""From tokens, one by one, to the text that they add."""

from __future__ import annotations

from collections.abc import Sequence

from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.words import WordTokenizer

_CONTEXT_TOKENS = 8
_UNFINISHED = "\ufffd"  # what stands for bytes that are no whole character


class TextStream:
    """What a text gains by each token.

    Tokens are decoded together with some that came before, for a tokenizer may write the first one of a text in another
    way. Bytes wait until they are a whole character.

    Args:
        tokenizer: The tokenizer.
        prompt: The tokens before the first that is streamed.
    """

    def __init__(self, tokenizer: Tokenizer | WordTokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._known = list(prompt[-_CONTEXT_TOKENS:])
        self._new: list[int] = []

    def push(self, token: int) -> str:
        """Take a token, and return the text that it completes; it may be empty."""
        self._new.append(token)
        return self._take(at_end=False)

    def finish(self) -> str:
        """Return what is left at the end; bytes that never became a character are replacement characters."""
        return self._take(at_end=True) if self._new else ""

    def _take(self, *, at_end: bool) -> str:
        before = self._tokenizer.decode(self._known)
        text = self._tokenizer.decode([*self._known, *self._new])
        # Four bytes are the longest character: what is unfinished after them is no text.
        if text.endswith(_UNFINISHED) and not at_end and len(self._new) < 4:
            return ""
        self._known = [*self._known, *self._new][-_CONTEXT_TOKENS:]
        self._new = []
        return text[len(before) :]
