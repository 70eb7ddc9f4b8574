"""The model of ours and the class of transformers side by side: their slopes, and their logits on the same tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    load_hf_model,
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
    comparison: LogitComparison | None
    """How far the logits are apart; None: they were not compared."""
    not_compared: str | None
    """Why they were not; None: they were."""
    unrounded_logit_difference: float | None
    """The same where the class was made to compute its bias in fp32; None: it was compared as it is."""
    bounds: Bounds
    """How far both may be apart."""

    def certify(self, **fields: Any) -> Certificate:
        """Return the certificate that says so.

        Args:
            fields: Those that say what was read and written.
        """
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Certificate(versions=describe_software(transformers=TRANSFORMERS_VERSION), **own, **fields)


def try_both(
    known: HfFormat,
    folder: Path,
    checkpoint: Checkpoint,
    text: ComparisonText,
    *,
    is_import: bool,
    rounds: bool,
    has_all_bits: bool = True,
    compare: bool = True,
    load: Callable[[HfFormat, Path], nn.Module] = load_hf_model,
) -> Trial:
    """Compare the slopes, and run both models.

    Args:
        known: The architecture.
        folder: Its folder.
        checkpoint: Ours, verified.
        text: The tokens.
        is_import: Whether the folder is the source.
        rounds: Whether the class rounds its bias, and the user accepts it. It is then run a second time with a bias in
            fp32, so that everything but the rounding is held to the bounds all the same.
        has_all_bits: Whether the folder has every bit of our weights, so that the logits must agree.
        compare: Whether to run the models.
        load: Returns the folder's model.

    Raises:
        CheckpointError: A file of the checkpoint does not hold what the manifest says.
        FileError: A file may not be read, or the class fails.
    """
    ours, theirs = model_slopes(checkpoint.config.model), find_their_slopes(known, checkpoint.config.model)
    slopes = compare_slopes(theirs, ours) if is_import else compare_slopes(ours, theirs)
    not_compared = WHY_NOT if not TRANSFORMERS_VERSION else None if compare else "--no-compare was given"
    comparison = unrounded = None
    if not_compared is None:
        model, our_SV = load(known, folder), compute_our_log_probs(checkpoint, text.tokens)

        def run() -> LogitComparison:
            their_SV = compute_their_logits(known, folder, model, text.tokens)
            source_SV, target_SV = (their_SV, our_SV) if is_import else (our_SV, their_SV)
            software = f"transformers {TRANSFORMERS_VERSION}, {known.architecture}, in float32 on the CPU"
            vocab_size = checkpoint.config.model.vocab_size
            return compare_logits(source_SV, target_SV, text, software=software, vocab_size=vocab_size)

        comparison = run()
        if rounds:
            with unrounded_bias(known):
                unrounded = run().largest_logit_difference
    return Trial(
        slopes=slopes,
        comparison=comparison,
        not_compared=not_compared,
        unrounded_logit_difference=unrounded,
        bounds=Bounds(
            slopes=None if theirs is None else MAX_ROUNDED_SLOPE_DIFFERENCE if rounds else MAX_SLOPE_DIFFERENCE,
            logits=_bound_logits(ours, len(text.tokens)) if comparison is not None and has_all_bits else None,
        ),
    )


def _bound_logits(slopes_H: Tensor, tokens: int) -> float:
    """Return how far logits may be apart: 1e-4, or what the class's own rounding makes of a long text.

    The classes add to the scores of all queries alike the slope times the distance from an end of the text. So a score
    next to the query, which we compute without a bias, is the difference of two numbers that may be as large as the
    steepest slope times the length of the text, and fp32 keeps 24 bits of them.
    """
    rounding = 2.0**-24 * slopes_H.max().item() * tokens
    return max(MAX_LOGIT_DIFFERENCE, _ROUNDINGS * rounding)
