"""A sentencepiece model as the ``tokenizer.json`` that transformers reads, with the same ids for every text.

sentencepiece writes a space within a piece as U+2581, and byte-pair merges two neighbours into the piece of the best
score that they make. Hugging Face's tokenizers have ranks for pairs, and no need of a sign for the space: here its
pieces have the space itself. So the sign U+2581 in a text is a character like any other, which is written as bytes, as
megalibi does it. No text is a control token: ``</s>`` written in a text is four characters, for sentencepiece knows it
by its id alone, and ``split_special_tokens`` tells transformers so.

What a model does before that, as joining spaces or NFKC, is not written: such a model is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders
from tokenizers.models import BPE

from megalibi.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from megalibi.errors import DataError
from megalibi.export.portable_tokenizer import ODD_TEXTS, SPACE_SIGN, check_portable
from megalibi.files import write_synced

_NAMES = {"unk_token": "unk_id", "bos_token": "bos_id", "eos_token": "eos_id", "pad_token": "pad_id"}
"""The special tokens by transformers' names, and sentencepiece's names for their ids."""


def write_hf_tokenizer(tokenizer_path: Path, folder: Path, *, max_length: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into a folder.

    Args:
        tokenizer_path: A sentencepiece model.
        folder: An existing folder.
        max_length: The tokens of the longest sequence that the model was trained on; transformers warns above it.

    Raises:
        DataError: It is no such model, or it cannot be written so that every text has the same ids; the reason is
            named.
        OSError: The disk is full or fails.
    """
    ours, model = check_portable(load_tokenizer(tokenizer_path), "tokenizer.json")
    fast = _build_fast_tokenizer(model)
    _compare(tokenizer_path, ours, fast)
    write_synced(folder / "tokenizer.json", fast.to_str(pretty=True).encode())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        **_find_special_tokens(model),
    }
    write_synced(folder / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())


def _build_fast_tokenizer(model: Any) -> FastTokenizer:
    kinds = type(model.pieces[0])
    pieces = [piece.piece.replace(SPACE_SIGN, " ") for piece in model.pieces]
    ids = {piece: token for token, piece in enumerate(pieces)}
    normal = {piece for piece, entry in zip(pieces, model.pieces, strict=True) if entry.type == kinds.NORMAL}
    scores = {piece: entry.score for piece, entry in zip(pieces, model.pieces, strict=True)}
    merges = [
        (piece[:place], piece[place:])
        for piece in sorted(normal, key=lambda piece: (-scores[piece], ids[piece]))
        for place in range(1, len(piece))
        if piece[:place] in normal and piece[place:] in normal
    ]
    unknown = pieces[model.trainer_spec.unk_id]
    fast = FastTokenizer(BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return fast


def _find_special_tokens(model: Any) -> dict[str, str]:
    ids = {name: getattr(model.trainer_spec, field) for name, field in _NAMES.items()}
    return {name: model.pieces[token].piece for name, token in ids.items() if 0 <= token < len(model.pieces)}


def _compare(path: Path, ours: Tokenizer, fast: FastTokenizer) -> None:
    """Check that both give the same ids to texts that are hard, and the texts back.

    Raises:
        DataError: They do not.
    """
    for text in ODD_TEXTS:
        ids = fast.encode(text, add_special_tokens=False).ids
        if ids != ours.encode(text) or fast.decode(ids, skip_special_tokens=False) != text:
            raise DataError(f"{path}: cannot become tokenizer.json: {text!r} would have other ids")
