"""Whether a conversion came out right: what its certificate says, against what is allowed."""

from __future__ import annotations

import math
from pathlib import Path

from megalibi.errors import FileError
from megalibi.export.certificate import Certificate, TensorRecord

MAX_LOGIT_DIFFERENCE = 1e-4
"""The largest difference of two logits between source and target in fp32."""
MAX_SLOPE_DIFFERENCE = 1e-6
"""The largest difference of two slopes, relative to the source's: a few bits in the last place."""
MAX_ROUNDED_SLOPE_DIFFERENCE = 2.0**-8
"""The same where the target's class rounds slopes to bfloat16, which has eight bits, and the user accepts it."""


def judge(certificate: Certificate, what: str) -> None:
    """Check that what a certificate says is within its bounds.

    Args:
        certificate: What came out.
        what: The software that runs what is not the source.

    Raises:
        FileError: A slope, a logit or a probability is past its bound, and named with by how much.
    """
    bounds, comparison = certificate.bounds, certificate.comparison
    if certificate.slopes is not None and certificate.slopes.largest_difference is not None:
        _check(certificate.slopes.largest_difference, bounds.slopes, "slopes", what)
    if comparison is not None:
        held = certificate.held_logit_difference
        _check(comparison.largest_logit_difference, None if held is not None else bounds.logits, "logits", what)
        _check(0.0 if held is None else held, bounds.logits, "logits", what)
        _check(comparison.largest_probability_difference, bounds.probabilities, "probabilities", what)


def check_equal(tensors: list[TensorRecord], output: Path) -> None:
    """Check that every tensor came out with the bits that it should have: before the work of a comparison.

    Args:
        tensors: What came out.
        output: What is written.

    Raises:
        FileError: Some did not; they are named.
    """
    if differing := [tensor.target for tensor in tensors if not tensor.bit_equal]:
        shown = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise FileError(
            f"{output}: {len(differing)} tensors read back from the disk are not what was written: {shown}; nothing "
            "is kept; try another disk"
        )


def _check(difference: float, bound: float | None, of: str, what: str) -> None:
    """Check a difference; one that is no number is allowed nowhere."""
    if not math.isfinite(difference):
        raise FileError(f"{what} computes {of} that are no numbers, or the source does: nothing is kept")
    if bound is not None and difference > bound:
        raise FileError(
            f"{what} computes other {of} than the source, by up to {difference:.1e}, where at most {bound:.1e} is "
            "allowed: nothing is kept"
        )
