from __future__ import annotations

import math
from typing import Any

import pytest

from megalibi.errors import FileError
from megalibi.export.certificate import Bounds, Certificate, LogitComparison, SlopeTables, TensorRecord
from megalibi.export.judge import judge


def make_certificate(
    *,
    slopes: float | None = 0.0,
    logits: float = 0.0,
    probabilities: float = 0.0,
    held: float | None = None,
    bounds: Bounds,
) -> Certificate:
    sides: dict[str, Any] = {"source_perplexity": 2.0, "target_perplexity": 2.0}
    return Certificate(
        versions={},
        source={},
        target={},
        tensors=[TensorRecord(source="a", target="b", source_sha256="0", target_sha256="0", bit_equal=True)],
        slopes=SlopeTables(source=[1.0], target=[1.0], largest_difference=slopes),
        comparison=LogitComparison(
            software="s",
            text="t",
            tokens=1,
            largest_logit_difference=logits,
            largest_probability_difference=probabilities,
            **sides,
        ),
        held_logit_difference=held,
        bounds=bounds,
    )


BOUNDS = Bounds(slopes=1e-6, logits=1e-4)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"slopes": 2e-6}, r"^X computes other slopes than the source, by up to 2\.0e-06, where at most 1\.0e-06 is"),
        ({"logits": 2e-4}, r"^X computes other logits than the source, by up to 2\.0e-04, where at most 1\.0e-04 is"),
        ({"logits": math.nan}, "^X computes logits that are no numbers"),
        ({"held": 2e-4}, "^X computes other logits than the source"),
        ({"probabilities": 2e-3, "bounds": Bounds(probabilities=1e-3)}, "^X computes other probabilities than"),
        ({"logits": math.nan, "bounds": Bounds()}, "^X computes logits that are no numbers"),
        ({"probabilities": math.inf, "bounds": Bounds()}, "^X computes probabilities that are no numbers"),
    ],
)
def test_what_is_past_a_bound_is_refused(found: dict[str, Any], message: str) -> None:
    with pytest.raises(FileError, match=message):
        judge(make_certificate(**{"bounds": BOUNDS, **found}), "X")


def test_what_is_within_its_bounds_passes() -> None:
    judge(make_certificate(slopes=1e-6, logits=1e-4, bounds=BOUNDS), "X")
    judge(make_certificate(slopes=None, logits=0.5, held=1e-5, bounds=BOUNDS), "X")
    judge(make_certificate(slopes=0.5, logits=0.5, probabilities=0.5, bounds=Bounds()), "X")
