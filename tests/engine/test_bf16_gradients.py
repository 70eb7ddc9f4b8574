from __future__ import annotations

import os
from unittest.mock import patch

import pytest
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from megalibi.config import Config
from megalibi.engine import bf16_gradients
from tests.support.device import ON_GPU
from tests.support.ranks import run_on_ranks
from tests.support.runs import Curve, build, curve_of, make_config, run_ours

STEPS = 6


def _run(config: Config, known_sources: frozenset[str]) -> tuple[str, Curve]:
    """The name of the optimizer's class, and losses and norms."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as in a deterministic run
    with patch.object(bf16_gradients, "KNOWN_SOURCES", known_sources):
        engine, _ = build(config)
        name = type(engine.optimizer).__name__
        engine.destroy()
        return name, curve_of(run_ours([config], STEPS)[0])


def make_bf16(prefix: str, stage: int = 1) -> Config:
    # Several micro batches on two ranks. Only a deterministic run has the same bits every time on a GPU.
    train = {"precision": "bf16", "global_batch_size": 12, "micro_batch_size": 2, "deterministic": ON_GPU}
    return make_config(prefix, train=train, zero={"stage": stage})


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.gpu), 2])
def test_losses_and_norms_are_those_of_deepspeeds_own_addition_to_the_bit(prefix: str, ranks: int) -> None:
    config = make_bf16(prefix)
    name, curve = run_on_ranks(ranks, _run, config, bf16_gradients.KNOWN_SOURCES)[0]
    assert name == "_Bf16Optimizer", "this DeepSpeed's BF16_Optimizer._update_hp_grad is not known"
    name_ref, curve_ref = run_on_ranks(ranks, _run, config, frozenset())[0]
    assert name_ref == BF16_Optimizer.__name__
    assert curve == curve_ref
    assert curve[0] != curve[-1]


def test_other_optimizers_are_left_alone(prefix: str) -> None:
    assert run_on_ranks(1, _run, make_bf16(prefix, stage=2), bf16_gradients.KNOWN_SOURCES)[0][0] not in (
        "_Bf16Optimizer", "BF16_Optimizer",
    )  # fmt: skip
