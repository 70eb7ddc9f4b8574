"""The tokenizer of a checkpoint: where it is, and whether it gives the same ids in other software."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import sentencepiece_model_pb2

from megalibi.checkpoint import Checkpoint
from megalibi.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from megalibi.data.tokenizer.words import WordTokenizer
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


class FoundTokenizer(NamedTuple):
    """The tokenizer of a checkpoint, or why it is not at hand."""

    tokenizer: Tokenizer | WordTokenizer | None
    """The tokenizer; None: it is not at hand."""
    reason: str
    """Why it is not at hand, as the end of a sentence; empty if it is."""
    is_given: bool
    """Whether the user named it."""


class PortableTokenizer(NamedTuple):
    """A byte-pair encoding that does nothing to a text before it cuts it."""

    tokenizer: Tokenizer
    """The tokenizer, as a run uses it."""
    model: Any
    """Its sentencepiece model, a ModelProto: pieces with their scores and kinds, and the ids that are special."""


def find_tokenizer(checkpoint: Checkpoint, given: Path | None) -> FoundTokenizer:
    """Return the tokenizer of a checkpoint, or why it is not at hand.

    Args:
        checkpoint: The checkpoint.
        given: What the user says it is; None: nothing.

    Raises:
        DataError: What the user gave is no tokenizer, or another one than the checkpoint's.
    """
    trained = checkpoint.manifest.data.get("tokenizer_sha256")
    path = given if given is not None else checkpoint.config.data.tokenizer
    if path is None:
        return FoundTokenizer(None, "the run had no data.tokenizer, and --tokenizer names none", is_given=False)
    if given is None and not Path(path).is_file():
        return FoundTokenizer(
            None, f"{path}, where the run had it, is not there, and --tokenizer names none", is_given=False
        )
    name = f"{path}" if given is None else f"--tokenizer={path}"
    try:
        tokenizer = load_tokenizer(path)
    except DataError as error:
        if given is not None:
            raise
        return FoundTokenizer(None, str(error), is_given=False)
    rows = checkpoint.config.model.vocab_size
    wrong = ""
    if trained not in (None, tokenizer.fingerprint):
        wrong = (
            f"{name} (sha256 {tokenizer.fingerprint[:12]}): must be the tokenizer that the checkpoint was trained with "
            f"(sha256 {trained[:12]})"
        )
    elif tokenizer.vocab_size > rows:
        wrong = f"{name}: must have at most model.vocab_size={rows} ids, and has {tokenizer.vocab_size}"
    if wrong and given is not None:
        raise DataError(wrong)
    return FoundTokenizer(None if wrong else tokenizer, wrong, is_given=given is not None)


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
