"""Training with the kernels of fused_ops under DeepSpeed, which gathers and empties the weights they read."""

from __future__ import annotations

import pytest

from fused_ops import fusing
from megalibi.config import Config
from tests.support.device import ON_GPU
from tests.support.ranks import run_on_ranks
from tests.support.runs import Curve, curve_of, largest_relative_difference, make_config, run_ours

RANKS = 1 if ON_GPU else 2
STEPS = 2
FP32_RELATIVE_BOUND = 1e-5


def _run(configs: list[Config], fused: bool) -> list[Curve]:
    with fusing(fused):
        return [curve_of(results) for results in run_ours(configs, STEPS)]


@pytest.mark.gpu
def test_losses_and_norms_are_those_without_under_zero_1_and_3(prefix: str) -> None:
    few = {"data": {"seq_length": 8}, "train": {"global_batch_size": 4, "micro_batch_size": 1}}  # for the interpreter
    configs = [make_config(prefix, zero={"stage": stage}, **few) for stage in (1, 3)]
    plain, fused = (run_on_ranks(RANKS, _run, configs, on)[0] for on in (False, True))
    for curve, curve_ref in zip(fused, plain, strict=True):
        assert 0 < largest_relative_difference(curve, curve_ref) < FP32_RELATIVE_BOUND
