"""A run goes on at any other tensor parallel size, number of data ranks, ZeRO stage and micro batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalibi.checkpoint import Checkpoint, load_checkpoint
from megalibi.config import Config
from megalibi.engine.ds_config import INITIAL_LOSS_SCALE_POWER
from megalibi.engine.masters import STATES, OptimizerProgress
from megalibi.engine.step import StepResult
from tests.support.ranks import run_on_ranks
from tests.support.runs import build, fp16_support, make_config
from tests.support.saving import save, take_steps

STEPS_BEFORE = 6
"""On one rank, before the first change, so that the optimizer has a state."""
STEPS_EACH = 3
RELATIVE_BOUND = 1e-5
CHAIN = [(1, 1, 0), (2, 1, 1), (4, 1, 3), (1, 1, 2), (1, 2, 0), (1, 4, 1), (2, 2, 3), (1, 2, 2), (4, 1, 0), (2, 2, 1)]
"""Tensor parallel size, data ranks and ZeRO stage, from one training to the next."""
NESTEROV = {"kind": "nesterov", "learning_rate": 0.3, "weight_decay": 0.01, "warmup_steps": 0}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "alibi, 12 heads, tied, biases, options for export": {
        "model": {"num_attention_heads": 12, "hidden_size": 48, "bias": True, "embedding_norm": True,
                  "scale_alibi": True, "activation": "gelu_tanh"},
    },
    "t5_bias, 20 heads, untied, nesterov": {
        "model": {"position_method": "t5_bias", "num_attention_heads": 20, "hidden_size": 80, "tie_embeddings": False},
        "optimizer": NESTEROV,
    },
    "adaptive, biases of norms alone, nesterov": {
        "model": {"adaptive_cutoffs": [41, 122], "norm_bias": True},
        "optimizer": NESTEROV,
    },
}  # fmt: skip


def on(prefix: str, topology: tuple[int, int, int], sections: dict[str, dict[str, Any]], **train: Any) -> Config:
    tensor, data, stage = topology
    train = {"micro_batch_size": 1 if data == 2 else 2, **train}
    parts: dict[str, Any] = {"parallel": {"tensor_parallel_size": tensor}, "zero": {"stage": stage}, "train": train}
    return make_config(prefix, **sections, **parts)


def train_and_save(config: Config, source: str | None, folder: str, first: int, last: int) -> list[StepResult]:
    """Begin anew or from a checkpoint, take steps, and save."""
    with fp16_support(True):
        engine, groups = build(config)
    if source is not None:
        assert load_checkpoint(engine, Path(source), groups).step == first
    results = take_steps(config, engine, groups, first, last)
    save(config, engine, groups, folder, last)
    engine.destroy()
    return results


def read_all(checkpoint: Path, kind: str) -> dict[tuple[str, str], torch.Tensor]:
    opened = Checkpoint.open(checkpoint)
    opened.verify()
    saved = opened.read_state()
    kinds = ("weight", *STATES[kind])
    assert saved.kinds == set(kinds)
    return {(name, kind): saved.read_whole(name, kind) for name in opened.parameters for kind in kinds}


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_go_on_over_every_change(prefix: str, tmp_path: Path, variant: str) -> None:
    sections = VARIANTS[variant]
    last = STEPS_BEFORE + STEPS_EACH * len(CHAIN)
    (straight,) = run_on_ranks(1, train_and_save, on(prefix, CHAIN[0], sections), None, str(tmp_path / "a"), 0, last)
    first, source, losses = 0, None, []
    for place, topology in enumerate(CHAIN):
        config, folder = on(prefix, topology, sections), tmp_path / str(place)
        last = STEPS_BEFORE + STEPS_EACH * (place + 1)
        by_rank = run_on_ranks(topology[0] * topology[1], train_and_save, config, source, str(folder), first, last)
        losses += [result.loss for result in by_rank[0]]
        source, first = str(folder / f"step_{last:08d}"), last
    expected = [result.loss for result in straight]
    assert expected[-1] < expected[0]
    assert losses == pytest.approx(expected, rel=RELATIVE_BOUND, abs=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_bit_of_any_tensor_is_lost(prefix: str, tmp_path: Path, variant: str, precision: str) -> None:
    """Loaded on another topology and saved again, without a step between."""
    sections = VARIANTS[variant]
    config = on(prefix, CHAIN[0], sections, precision=precision)
    run_on_ranks(1, train_and_save, config, None, str(tmp_path / "0"), 0, STEPS_BEFORE)
    name = f"step_{STEPS_BEFORE:08d}"
    expected = read_all(tmp_path / "0" / name, config.optimizer.kind)
    assert all(tensor.count_nonzero() > 0 for tensor in expected.values())
    progress = Checkpoint.open(tmp_path / "0" / name).read_state().read_progress()
    for place, topology in enumerate(CHAIN[1:], 1):
        config = on(prefix, topology, sections, precision=precision)
        folders = str(tmp_path / str(place - 1) / name), str(tmp_path / str(place))
        run_on_ranks(topology[0] * topology[1], train_and_save, config, *folders, STEPS_BEFORE, STEPS_BEFORE)
        found = read_all(tmp_path / str(place) / name, config.optimizer.kind)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), (topology, key)
        assert Checkpoint.open(tmp_path / str(place) / name).read_state().read_progress() == progress


def test_the_loss_scale_of_fp16_goes_on(prefix: str, tmp_path: Path) -> None:
    """Large weights let gradients overflow at the first scales."""
    sections = {"model": {"init_std": 0.5}}
    first, source, progress = (
        0,
        None,
        OptimizerProgress(updates=0, loss_scale=2.0**INITIAL_LOSS_SCALE_POWER, good_steps=0),
    )
    for place, topology in enumerate([(1, 1, 0), (2, 2, 1), (1, 4, 3), (4, 1, 2), (1, 2, 0)]):
        config, folder, last = on(prefix, topology, sections, precision="fp16"), tmp_path / str(place), first + 5
        by_rank = run_on_ranks(topology[0] * topology[1], train_and_save, config, source, str(folder), first, last)
        for result in by_rank[0]:
            assert result.loss_scale == progress.loss_scale
            if result.skipped:
                progress = replace(progress, loss_scale=progress.loss_scale / 2, good_steps=0)
            else:
                progress = replace(progress, updates=progress.updates + 1, good_steps=progress.good_steps + 1)
        assert Checkpoint.open(folder).read_state().read_progress() == progress
        source, first = str(folder / f"step_{last:08d}"), last
    assert 0 < progress.updates < first
    assert progress.good_steps > 0
