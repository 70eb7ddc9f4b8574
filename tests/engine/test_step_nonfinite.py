"""A number that is not finite on one rank leaves weights and optimizer as they were on every rank."""

from __future__ import annotations

import math

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from megalibi.config import Config
from megalibi.engine.masters import find_masters, read_progress
from megalibi.engine.step import StepResult
from tests.support.poison import find_token, write_embedding
from tests.support.ranks import run_on_ranks
from tests.support.runs import build, make_config
from tests.support.saving import take_steps

UNTIED = {"tie_embeddings": False}
"""With a tied output layer the token would spoil the logits of every sample."""
CASES = ((0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (3, "fp32"))


def copy_state(engine: DeepSpeedEngine, config: Config) -> dict[str, Tensor]:
    """Everything that the rank holds of weights and optimizer, by name."""
    # Of a parameter that ZeRO 3 has cut, whether the whole one is at hand is no part of the state.
    state = {f"model/{n}": getattr(p, "ds_tensor", p).detach().clone() for n, p in engine.module.named_parameters()}
    for master in find_masters(engine, config.optimizer.kind):
        for kind, values in {"weight": master.weight, **master.states}.items():
            state[f"{kind}/{master.name}/{master.start}"] = values.clone()
    return state


def are_equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit by bit, so that a NaN equals itself."""
    return state.keys() == other.keys() and all(
        torch.equal(state[name].view(torch.uint8), other[name].view(torch.uint8)) for name in state
    )


def meet_nan(config: Config) -> tuple[StepResult, bool, bool, bool]:
    """Meet the token in the second of three steps.

    Returns the step's result; whether it changed nothing; and whether the step after it was, digit for digit, that of a
    run that never took it, and left the same weights.
    """
    token = find_token(config, step=1, steps=3)
    runs = []
    for meets in (True, False):
        engine, groups = build(config)
        take_steps(config, engine, groups, 0, 1)
        write_embedding(engine, config, token, math.nan)
        before, progress = copy_state(engine, config), read_progress(engine)
        if meets:
            (bad,) = take_steps(config, engine, groups, 1, 2)
            untouched = are_equal(copy_state(engine, config), before) and read_progress(engine) == progress
        (after,) = take_steps(config, engine, groups, 2, 3)
        runs.append((after, copy_state(engine, config)))
        engine.destroy()
    (after, state), (after_ref, state_ref) = runs
    assert not are_equal(state, before)  # else the comparison would show nothing
    return bad, untouched, after == after_ref, are_equal(state, state_ref)


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_nan_on_one_rank_changes_nothing_on_any(prefix: str, stage: int, precision: str) -> None:
    config = make_config(prefix, model=UNTIED, zero={"stage": stage}, train={"precision": precision})
    first, second = run_on_ranks(2, meet_nan, config)
    for result, *held in (first, second):
        assert math.isnan(result.loss)
        assert not math.isfinite(result.grad_norm)
        assert result.skipped
        assert held == [True, True, True]
    assert first[0].bad_samples == ()
    positions = [position for _, position in second[0].bad_samples]
    # Samples 8 to 15 of the order, in micro batches of 2 that the ranks take in turn: 10, 11, 14 and 15 are rank 1's.
    assert positions
    assert set(positions) <= {10, 11, 14, 15}
    assert [index for index, _ in second[0].bad_samples] == [(position - 8) // 4 for position in positions]


def meet_infinite_loss(config: Config) -> tuple[StepResult, bool]:
    """Add infinity to a sample's loss on the last rank, which leaves each rank's own gradient finite."""
    engine, groups = build(config)
    if groups.world.rank == 1:
        engine.module.register_forward_hook(
            lambda _module, _inputs, losses_BS: torch.cat([losses_BS[:1] + math.inf, losses_BS[1:]])
        )
    before = copy_state(engine, config)
    (result,) = take_steps(config, engine, groups, 0, 1)
    untouched = are_equal(copy_state(engine, config), before)
    engine.destroy()
    return result, untouched


@pytest.mark.parametrize("stage", [0, 1])
def test_an_infinite_loss_with_a_finite_gradient_changes_nothing_either(prefix: str, stage: int) -> None:
    config = make_config(prefix, zero={"stage": stage})
    for rank, (result, untouched) in enumerate(run_on_ranks(2, meet_infinite_loss, config)):
        assert (result.loss, result.skipped, untouched) == (math.inf, True, True)
        assert result.bad_samples == (((0, 2), (1, 6)) if rank == 1 else ())
