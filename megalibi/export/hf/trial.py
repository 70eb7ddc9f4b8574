"""The model of ours and the class of transformers side by side: their slopes, and their logits on the same tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megalibi.checkpoint import Checkpoint
from megalibi.export.certificate import (
    Bounds,
    Certificate,
    LogitComparison,
    SlopeTables,
    compare_slopes,
    describe_software,
)
from megalibi.export.comparison import ComparisonText, compare_logits, compute_our_log_probs
from megalibi.export.hf.formats import HfFormat
from megalibi.export.hf.software import (
    TRANSFORMERS_VERSION,
    WHY_NOT,
    compute_their_logits,
    find_their_slopes,
    unrounded_bias,
)
from megalibi.export.judge import MAX_LOGIT_DIFFERENCE, MAX_ROUNDED_SLOPE_DIFFERENCE, MAX_SLOPE_DIFFERENCE
from megalibi.model import model_slopes

_ROUNDINGS = 4
"""Roundings of a score that a logit may be off by, after all layers: models of random weights are off by up to 3."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of it."""

    slopes: SlopeTables
    """The slopes of both sides."""
    comparison: LogitComparison | None = None
    """How far the logits are apart; None: they were not compared."""
    not_compared: str | None = None
    """Why they were not; None: they were."""
    held_logit_difference: float | None = None
    """The same without what the target is known to round; None: it rounds nothing."""
    bounds: Bounds
    """How far both may be apart."""

    def certify(self, **fields: Any) -> Certificate:
        """Return the certificate that says so.

        Args:
            fields: Those that say what was read and written.
        """
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Certificate(versions=describe_software(transformers=TRANSFORMERS_VERSION), **own, **fields)


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The two that are compared."""

    known: HfFormat
    """The architecture that transformers has of it."""
    load: Callable[[], nn.Module]
    """Returns the model of the folder, in fp32."""
    name: Path
    """What errors call the folder."""
    checkpoint: Checkpoint
    """Our side, whose files were verified."""
    is_import: bool
    """Whether the folder is the source."""
    rounds_bias: bool
    """Whether the class rounds its bias, and the user accepts it."""
    dtype: torch.dtype = torch.float32
    """The type to which the folder's weights are rounded."""


def try_both(sides: Sides, text: ComparisonText, *, compare: bool) -> Trial:
    """Compare the slopes, and run both models.

    What the target is known to round, its weights or its bias, is left out of a second run, in which ours has the
    rounded weights and the class its bias in fp32: everything but the rounding is held to the bounds all the same.

    Args:
        sides: The two.
        text: The tokens.
        compare: Whether to run the models.

    Raises:
        CheckpointError: A file of the checkpoint does not hold what the manifest says.
        FileError: A file may not be read, or the class fails.
    """
    model = sides.checkpoint.config.model
    ours, theirs = model_slopes(model), find_their_slopes(sides.known, model)
    slopes = compare_slopes(theirs, ours) if sides.is_import else compare_slopes(ours, theirs)
    slope_bound = MAX_ROUNDED_SLOPE_DIFFERENCE if sides.rounds_bias else MAX_SLOPE_DIFFERENCE
    bounds = Bounds(slopes=None if theirs is None else slope_bound)
    if not TRANSFORMERS_VERSION or not compare:
        not_compared = "--no-compare was given" if TRANSFORMERS_VERSION else WHY_NOT
        return Trial(slopes=slopes, not_compared=not_compared, bounds=bounds)
    comparison, held = _run_both(sides, text)
    return Trial(
        slopes=slopes,
        comparison=comparison,
        held_logit_difference=held,
        bounds=dataclasses.replace(bounds, logits=_bound_logits(ours, len(text.tokens))),
    )


def _run_both(sides: Sides, text: ComparisonText) -> tuple[LogitComparison, float | None]:
    """Run both models, and once more without what is rounded; return how far they are apart in either."""
    model, known, dtype = sides.load(), sides.known, sides.dtype

    def compare(our_SV: Tensor, their_SV: Tensor) -> LogitComparison:
        source_SV, target_SV = (their_SV, our_SV) if sides.is_import else (our_SV, their_SV)
        software = f"transformers {TRANSFORMERS_VERSION}, {known.architecture}, in float32 on the CPU"
        vocab_size = sides.checkpoint.config.model.vocab_size
        return compare_logits(source_SV, target_SV, text, software=software, vocab_size=vocab_size)

    our_SV = compute_our_log_probs(sides.checkpoint, text.tokens)
    their_SV = compute_their_logits(known, sides.name, model, text.tokens)
    comparison = compare(our_SV, their_SV)
    if dtype != torch.float32:
        our_SV = compute_our_log_probs(sides.checkpoint, text.tokens, lambda values: values.to(dtype).float())
    if sides.rounds_bias:
        with unrounded_bias(known):
            their_SV = compute_their_logits(known, sides.name, model, text.tokens)
    is_rounded = sides.rounds_bias or dtype != torch.float32
    return comparison, compare(our_SV, their_SV).largest_logit_difference if is_rounded else None


def _bound_logits(slopes_H: Tensor, tokens: int) -> float:
    """Return how far logits may be apart: 1e-4, or what the class's own rounding makes of a long text.

    The classes add to the scores of all queries alike the slope times the distance from an end of the text. So a score
    next to the query, which we compute without a bias, is the difference of two numbers that may be as large as the
    steepest slope times the length of the text, and fp32 keeps 24 bits of them.
    """
    rounding = 2.0**-24 * slopes_H.max().item() * tokens
    return max(MAX_LOGIT_DIFFERENCE, _ROUNDINGS * rounding)
