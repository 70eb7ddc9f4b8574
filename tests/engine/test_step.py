from __future__ import annotations

import numpy as np
import pytest

from megalibi.config import Config
from tests.engine.runs import Curve, make_config, run_ours, run_plain, write_tokens
from tests.ranks import run_on_ranks

FP32_RELATIVE_BOUND = 1e-5
STEPS = 30
TOPOLOGIES = [(tensor, data) for tensor in (1, 2, 4) for data in (1, 2)]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


def largest_relative_difference(curve: Curve, curve_ref: Curve) -> float:
    a, b = np.array(curve), np.array(curve_ref)
    return float(np.max(np.abs(a - b) / np.abs(b)))


def run_each(configs: list[Config], steps: int) -> list[tuple[Curve, list[int]]]:
    return [run_ours(config, steps) for config in configs]


@pytest.mark.parametrize(("tensor", "data"), TOPOLOGIES)
def test_trap_1_6_8_16_every_topology_and_zero_stage_equals_plain_pytorch(prefix: str, tensor: int, data: int) -> None:
    curve_ref = run_plain(make_config(prefix), STEPS)
    assert min(norm for _, norm in curve_ref[3:]) > 0.5  # clipping is active
    assert curve_ref[-1][0] < 0.8 * curve_ref[0][0]  # something is learned
    configs = [
        make_config(prefix, parallel={"tensor_parallel_size": tensor}, zero={"stage": stage}) for stage in (0, 1, 2, 3)
    ]
    by_rank = run_on_ranks(tensor * data, run_each, configs, STEPS)
    for stage in (0, 1, 2, 3):
        for results in by_rank:
            assert largest_relative_difference(results[stage][0], curve_ref) < FP32_RELATIVE_BOUND, stage
            assert results[stage][1] == by_rank[0][0][1]
