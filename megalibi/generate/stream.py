"""From tokens, one by one, to the text that they add."""

from __future__ import annotations

from collections.abc import Sequence

from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.words import WordTokenizer

_CONTEXT_TOKENS = 8
_MAX_UNFINISHED_TOKENS = 3  # four bytes are the longest character
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
        num_ready = len(self._new)
        if text.endswith(_UNFINISHED) and not at_end:
            # The last tokens may be the beginning of a character; those before them are no text.
            num_ready = max(0, num_ready - _MAX_UNFINISHED_TOKENS)
            text = self._tokenizer.decode([*self._known, *self._new[:num_ready]])
        self._known = [*self._known, *self._new[:num_ready]][-_CONTEXT_TOKENS:]
        self._new = self._new[num_ready:]
        return text[len(before) :]
