"""What a checkpoint would become as a folder of Hugging Face: decided from its manifest, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalibi.checkpoint import Checkpoint
from megalibi.errors import ConfigError, DataError
from megalibi.export.comparison import check_comparison_memory
from megalibi.export.hf.bias_rounding import describe_rounding
from megalibi.export.hf.formats import MAX_LENGTH, HfFormat
from megalibi.export.hf.software import TRANSFORMERS_VERSION, WHY_NOT
from megalibi.export.portable_tokenizer import FoundTokenizer, check_portable

HF_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The types of weights that can be written, by PyTorch's names."""
_MAX_LENGTH_FACTOR = 16


@dataclass(frozen=True, kw_only=True)
class HfPlan:
    """What a checkpoint becomes."""

    known: HfFormat
    """The architecture that is written."""
    dtype: str
    """The type of the weights, as PyTorch names it."""
    max_length: int
    """The most tokens that the folder's config.json allows where its class has a cap."""
    found: FoundTokenizer
    """The tokenizer of the checkpoint."""
    carries_tokenizer: bool
    """Whether the tokenizer comes along."""
    notes: tuple[str, ...]
    """What a user should know besides, a sentence each."""
    rounds: bool
    """Whether the class computes another bias than the model was trained with, and the user accepts it."""
    compare: bool
    """Whether both models are run on a text, where transformers is installed."""


def plan_hf(
    checkpoint: Checkpoint,
    known: HfFormat,
    found: FoundTokenizer,
    *,
    dtype: str = "float32",
    max_length: int | None = None,
    accept_rounded_bias: bool = False,
    compare: bool = True,
) -> HfPlan:
    """Return what a checkpoint would become.

    Args:
        checkpoint: The checkpoint.
        known: The architecture.
        found: The tokenizer of the checkpoint, of find_tokenizer.
        dtype: The type of the weights, a key of HF_DTYPES.
        max_length: The most tokens; None: 16 times the training length.
        accept_rounded_bias: Whether a class may compute the bias in 16 bits.
        compare: Whether to run both models on a text.

    Raises:
        ConfigError: The format cannot hold the model, and the message names every field with the reason; an option is
            out of range or of another format; or the host has no room for the comparison.
        DataError: The user gave a tokenizer that transformers would cut texts with otherwise.
    """
    config = checkpoint.config
    refusals, notes = list(known.find_refusals(config.model)), []
    rounding = None if refusals else describe_rounding(known, config.model, config.data.seq_length)
    if rounding is not None:
        if not accept_rounded_bias:
            refusals.append(f"{rounding}: give --accept-rounded-bias if that may be")
        notes.append(f"{rounding}; that was accepted when this folder was written.")
    if refusals:
        raise ConfigError("; ".join(refusals))
    if max_length is not None and known.name == "bloom":
        raise ConfigError(f"--max-length={max_length}: must not stand beside --format bloom, whose class has no cap")
    if accept_rounded_bias and not known.rounds_bias:
        raise ConfigError(f"--accept-rounded-bias: must stand beside --format falcon, and not {known.name}")
    least = config.data.seq_length
    length = min(_MAX_LENGTH_FACTOR * least, MAX_LENGTH) if max_length is None else max_length
    if not least <= length <= MAX_LENGTH:
        raise ConfigError(f"--max-length={length}: must be from data.seq_length={least} to {MAX_LENGTH}")
    check_comparison_memory(config, compare=compare and TRANSFORMERS_VERSION is not None)
    absence = _explain_absence(found)
    if absence is not None:
        notes.append(f"No tokenizer comes along: {absence}.")
    return HfPlan(
        known=known,
        dtype=dtype,
        max_length=length,
        found=found,
        carries_tokenizer=absence is None,
        notes=tuple(notes),
        rounds=rounding is not None,
        compare=compare,
    )


def _explain_absence(found: FoundTokenizer) -> str | None:
    """Return why a tokenizer does not come along; None: it does."""
    if found.tokenizer is None:
        return found.reason
    if not TRANSFORMERS_VERSION:
        return WHY_NOT
    try:
        check_portable(found.tokenizer, "tokenizer.json")
    except DataError as error:
        if found.is_given:
            raise
        return str(error)
    return None
