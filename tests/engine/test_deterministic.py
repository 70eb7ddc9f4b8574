from __future__ import annotations

import torch

from megalibi.config import Config
from tests.engine.test_golden import GOLDEN_RELATIVE_BOUND, STEPS, read_golden
from tests.support.ranks import run_on_ranks
from tests.support.runs import Curve, curve_of, largest_relative_difference, make_config, run_ours


def _run_and_ask(configs: list[Config]) -> list[tuple[Curve, bool]]:
    """The curve of each run, and whether the process is deterministic after it."""
    results = []
    for config in configs:
        (run,) = run_ours([config], STEPS)
        results.append((curve_of(run), torch.are_deterministic_algorithms_enabled()))
    return results


def test_a_deterministic_run_has_the_same_losses_on_a_cpu_and_ends_with_the_run(prefix: str) -> None:
    configs = [make_config(prefix, zero={"stage": 1}, train={"deterministic": on}) for on in (False, True, False)]
    (before, deterministic, after) = run_on_ranks(1, _run_and_ask, configs)[0]
    assert [is_on for _, is_on in (before, deterministic, after)] == [False, True, False]
    assert before[0] == deterministic[0] == after[0]
    assert largest_relative_difference(deterministic[0], read_golden()) < GOLDEN_RELATIVE_BOUND
