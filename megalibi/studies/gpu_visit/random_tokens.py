"""Tokens for where there is no text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megalibi.data.tokens.token_file import TokenFileWriter
from megalibi.files import make_folder

TOKENS = 1 << 22
_DOCUMENT_TOKENS = 997


def write_random_tokens(prefix: Path, vocab_size: int, num_tokens: int = TOKENS) -> None:
    """Write a token file of random ids, to be trained on where there is no text.

    In the first steps of a model a step takes as long as on text, all but attention: how far the horizon of our kernels
    reaches depends on q and k, and so on the text and on how long the model has been trained.

    Args:
        prefix: Of the files; what is there already stays.
        vocab_size: Of the ids.
        num_tokens: In all.
    """
    if prefix.with_name(f"{prefix.name}.idx").exists():
        return
    make_folder(prefix.parent)
    ids = np.random.default_rng(0).integers(0, vocab_size, num_tokens)
    with TokenFileWriter(prefix, vocab_size) as writer:
        for start in range(0, num_tokens, _DOCUMENT_TOKENS):
            writer.add_document(ids[start : start + _DOCUMENT_TOKENS])
