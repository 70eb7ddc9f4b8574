"""Losses and gradient norms of a tiny run, as they were: a change of arithmetic, initial weights or data order shows.

``python -m tests.engine.test_golden`` writes the file anew.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.support.ranks import run_on_ranks
from tests.support.runs import Curve, curve_of, largest_relative_difference, make_config, run_ours, write_tokens

GOLDEN = Path(__file__).parents[1] / "golden" / "quick_fp32.txt"
GOLDEN_RELATIVE_BOUND = 2e-6
"""Not 0: processors with wider vectors sum in another order, which moves the last bit or two of fp32 (6e-8 each)."""
STEPS = 10
HEADER = """\
# Loss and gradient norm of 10 fp32 steps on a CPU of the run in tests/engine/test_golden.py (torch 2.13.0).
# Written by: python -m tests.engine.test_golden
"""


def run_quick(prefix: str) -> Curve:
    (results,) = run_on_ranks(1, run_ours, [make_config(prefix, zero={"stage": 1})], STEPS)[0]
    return curve_of(results)


def read_golden() -> Curve:
    lines = [line for line in GOLDEN.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return [(float(loss), float(norm)) for loss, norm in map(str.split, lines)]


def write_golden() -> None:
    with tempfile.TemporaryDirectory() as folder:
        curve = run_quick(write_tokens(Path(folder)))
    GOLDEN.write_text(HEADER + "".join(f"{loss!r} {norm!r}\n" for loss, norm in curve), encoding="utf-8")


def test_losses_are_those_of_the_golden_file(prefix: str) -> None:
    golden = read_golden()
    assert len(golden) == STEPS
    assert largest_relative_difference(run_quick(prefix), golden) < GOLDEN_RELATIVE_BOUND


@pytest.mark.parametrize("changed", [{"train": {"seed": 1235}}, {"model": {"layer_norm_epsilon": 2e-5}}])
def test_a_small_change_would_show(prefix: str, changed: dict[str, dict[str, float]]) -> None:
    (results,) = run_on_ranks(1, run_ours, [make_config(prefix, zero={"stage": 1}, **changed)], STEPS)[0]
    assert largest_relative_difference(curve_of(results), read_golden()) > GOLDEN_RELATIVE_BOUND


if __name__ == "__main__":
    write_golden()
