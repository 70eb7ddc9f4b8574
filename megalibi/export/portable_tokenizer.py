"""Which tokenizers give the same ids in other software, and texts on which that is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import sentencepiece_model_pb2

from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.errors import DataError

SPACE_SIGN = "\u2581"
"""How sentencepiece writes a space within a piece."""
ODD_TEXTS = (
    "",
    " ",
    "  two  spaces,   three, and one at the end ",
    "a\tb\n\nc\r\n\x00\x7f",
    "na\u00efve nai\u0308ve \u0130stanbul \ufb01ne \u2126\u2167\u00bd",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4 "
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1f3\U0001f1f1 \U0010fffd \ufffd \ufeff",
    "a\u2581b \u2581 c\u2581\u2581",
    "<unk><s></s> </s>\n<0x41><0xE2> <pad>",
    "0123456789 3.14159 1,000,000 -1e-5",
    "aaaaaaaaaaaaaaa ---------- ======= ........... ((((((()))))))",
    "def f(x):\n    return x ** 2  # caf\u00e9\n\n\n",
)
"""Texts whose ids are compared at each conversion, beside those of the tests."""


class PortableTokenizer(NamedTuple):
    """A byte-pair encoding that does nothing to a text before it cuts it."""

    tokenizer: Tokenizer
    """The tokenizer, as a run uses it."""
    model: Any
    """Its sentencepiece model, a ModelProto: pieces with their scores and kinds, and the ids that are special."""


def check_portable(tokenizer: object, target: str) -> PortableTokenizer:
    """Return a tokenizer with its model, if other software can cut every text as it does.

    Args:
        tokenizer: A tokenizer of ours.
        target: What it is to become, for the message.

    Raises:
        DataError: It is a word-level vocabulary, or its model does what others do not; the reason is named.
    """
    if not isinstance(tokenizer, Tokenizer):
        path = getattr(tokenizer, "path", tokenizer)
        raise DataError(f"{path}: a word-level vocabulary; only sentencepiece models become {target}")
    content = Path(tokenizer.path).read_bytes()
    model = sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]
    trainer, kinds = model.trainer_spec, sentencepiece_model_pb2.ModelProto.SentencePiece  # type: ignore[attr-defined]
    reason = None
    if trainer.model_type != trainer.BPE:
        reason = "is no byte-pair encoding"
    elif not tokenizer.is_exact:
        reason = "changes texts before it cuts them (a normalizer, spaces that it adds or joins), or has no byte pieces"
    elif any(piece.type == kinds.USER_DEFINED for piece in model.pieces):
        reason = "has pieces of its user, which are found before all others"
    if reason is not None:
        raise DataError(f"{tokenizer.path}: cannot become {target} with the same ids for every text: it {reason}")
    return PortableTokenizer(tokenizer, model)
