"""The seconds that steps are expected to take; their outcomes are read in test_visit.py, which writes them."""

from __future__ import annotations

from typing import Any

from megalibi.studies.gpu_visit.step import VisitStep, expect_seconds


def test_steps_in_the_background_take_no_time_of_others() -> None:
    def step(name: str, expected: float, **more: Any) -> VisitStep:
        return VisitStep(name=name, what="", command=(), limit=99.0, expected=expected, **more)

    warm, short = step("warm", 45.0, in_background=True), step("short", 8.0)
    assert expect_seconds([warm, short]) == 45.0
    assert expect_seconds([warm, short, step("waits", 10.0, after="warm")]) == 55.0
    assert expect_seconds([warm, short, step("long", 60.0)]) == 68.0
    assert expect_seconds([step("not here", 60.0, impossible="no"), step("waits", 10.0, after="not here")]) == 10.0
