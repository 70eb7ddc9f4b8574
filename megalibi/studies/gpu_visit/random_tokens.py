"""A token file of random ids, to train on where there is no text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megalibi.data.tokens.token_file import TokenFileWriter
from megalibi.files import make_folder

TOKENS = 1 << 22
"""Tokens of the file: enough for every step of a visit."""
_DOCUMENT_TOKENS = 997


def write_random_tokens(prefix: Path, vocab_size: int, num_tokens: int = TOKENS) -> None:
    """Write a token file of random ids, to train on where there is no text.

    In the first steps of a model everything but attention takes as long as on text. The time of attention differs: how
    far the horizon of our kernels reaches depends on q and k, and so on the text and on the training so far.

    Args:
        prefix: Prefix of the files; files that are there already stay as they are.
        vocab_size: Vocabulary size of the ids.
        num_tokens: Number of ids to write.

    Raises:
        FileError: The files cannot be written.
    """
    if prefix.with_name(f"{prefix.name}.idx").exists():
        return
    make_folder(prefix.parent)
    ids = np.random.default_rng(0).integers(0, vocab_size, num_tokens)
    with TokenFileWriter(prefix, vocab_size) as writer:
        for start in range(0, num_tokens, _DOCUMENT_TOKENS):
            writer.add_document(ids[start : start + _DOCUMENT_TOKENS])
