"""A token file of random ids, to train on where there is no text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megalibi.data.tokens.token_file import TokenFileWriter
from megalibi.files import make_folder

DOCUMENT_TOKENS = 997
_BLOCK_DOCUMENTS = 1 << 13


def write_random_tokens(prefix: Path, vocab_size: int, num_tokens: int) -> None:
    """Write a token file of random ids, to train on where there is no text.

    In the first steps of a model everything but attention takes as long as on text. The time of attention differs: how
    far the horizon of our kernels reaches depends on q and k, and so on the text and on the training so far.

    Args:
        prefix: Prefix of the files; files that are there already stay as they are.
        vocab_size: Vocabulary size of the ids.
        num_tokens: Number of ids to write, in documents of ``DOCUMENT_TOKENS``.

    Raises:
        FileError: The files cannot be written.
    """
    if prefix.with_name(f"{prefix.name}.idx").exists():
        return
    make_folder(prefix.parent)
    generator = np.random.default_rng(0)
    with TokenFileWriter(prefix, vocab_size) as writer:
        while (left := num_tokens - writer.num_tokens) > 0:
            ids = generator.integers(0, vocab_size, min(left, _BLOCK_DOCUMENTS * DOCUMENT_TOKENS))
            for start in range(0, len(ids), DOCUMENT_TOKENS):
                writer.add_document(ids[start : start + DOCUMENT_TOKENS])
