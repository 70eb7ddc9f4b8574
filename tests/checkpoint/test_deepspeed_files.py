"""Checkpoints of format 2, whose files DeepSpeed wrote: they hold what ours do, and load on any topology."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from megalibi.checkpoint import Checkpoint, load_checkpoint
from megalibi.config import Config
from megalibi.engine.ds_config import LOSS_SCALE_WINDOW
from megalibi.engine.masters import STATES, read_good_steps
from megalibi.engine.optimizer import ClippedAdamW
from megalibi.errors import CheckpointError
from megalibi.parallel import ALONE
from tests.support.format_2 import save_format_2
from tests.support.ranks import run_on_ranks
from tests.support.runs import STAGES, build, make_config
from tests.support.saving import save, take_steps

STEPS = 3
OPTIMIZERS = {
    "adamw": {"kind": "adamw"},
    "nesterov": {"kind": "nesterov", "learning_rate": 0.3, "weight_decay": 0.01, "warmup_steps": 0},
}


def configure(prefix: str, stage: int, tensor: int, precision: str, optimizer: str) -> Config:
    """Some sizes are odd on 2 tensor ranks, so that 2 data ranks need padding."""
    return make_config(
        prefix,
        model={"hidden_size": 46, "num_attention_heads": 2, "ffn_hidden_size": 98, "bias": True},
        parallel={"tensor_parallel_size": tensor},
        zero={"stage": stage},
        train={"precision": precision},
        optimizer=OPTIMIZERS[optimizer],
    )


def save_in_both(config: Config, ours: str, theirs: str) -> None:
    engine, groups = build(config)
    take_steps(config, engine, groups, 0, STEPS)
    save(config, engine, groups, ours, STEPS)
    save_format_2(config, engine, groups, theirs, STEPS)
    engine.destroy()


def load_and_save(config: Config, source: str, folder: str) -> None:
    engine, groups = build(config)
    load_checkpoint(engine, Path(source), groups)
    save(config, engine, groups, folder, STEPS)
    engine.destroy()


def assert_equal(first: Path, second: Path, optimizer: str) -> None:
    opened = [Checkpoint.open(path) for path in (first, second)]
    states = [checkpoint.read_state() for checkpoint in opened]
    kinds = {"weight", *STATES[optimizer]}
    assert states[0].kinds == states[1].kinds == kinds
    assert states[0].read_progress() == states[1].read_progress()
    for name in opened[0].parameters:
        for kind in kinds:
            tensor = states[0].read_whole(name, kind)
            assert torch.equal(tensor, states[1].read_whole(name, kind)), (name, kind)
            assert tensor.count_nonzero() > 0


@pytest.mark.parametrize(
    ("tensor", "data", "precision", "optimizer"),
    [(1, 1, "bf16", "adamw"), (2, 2, "fp32", "adamw"), (1, 4, "bf16", "nesterov"), (2, 2, "bf16", "adamw")],
)
@pytest.mark.parametrize("stage", STAGES)
def test_they_hold_what_ours_do_and_load_elsewhere(
    prefix: str, tmp_path: Path, stage: int, tensor: int, data: int, precision: str, optimizer: str
) -> None:
    config = configure(prefix, stage, tensor, precision, optimizer)
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    run_on_ranks(tensor * data, save_in_both, config, ours, theirs)
    assert Checkpoint.open(Path(theirs)).manifest.format_version == 2
    assert_equal(Path(ours), Path(theirs), optimizer)

    elsewhere = configure(prefix, (stage + 1) % 4, 3 - tensor, precision, optimizer)
    name = f"step_{STEPS:08d}"
    run_on_ranks(2, load_and_save, elsewhere, f"{theirs}/{name}", str(tmp_path / "elsewhere"))
    assert_equal(Path(ours), tmp_path / "elsewhere", optimizer)


def test_files_that_do_not_hold_an_optimizer_are_one_line(prefix: str, tmp_path: Path) -> None:
    config = configure(prefix, 1, 1, "fp32", "adamw")
    run_on_ranks(1, save_in_both, config, str(tmp_path / "ours"), str(tmp_path / "theirs"))
    checkpoint = Checkpoint.open(tmp_path / "theirs")
    (path,) = checkpoint.path.glob("*optim_states.pt")
    states = torch.load(path, weights_only=False)
    del states["optimizer_state_dict"]["param_slice_mappings"]
    torch.save(states, path)
    with pytest.raises(
        CheckpointError, match="does not hold the optimizer as DeepSpeed writes it: KeyError"
    ) as refusal:
        checkpoint.read_state()
    assert "\n" not in str(refusal.value)


def compare_loss_scales() -> float:
    """Let gradients overflow now and then; return our scale at the end."""
    theirs = DynamicLossScaler(2.0**16, LOSS_SCALE_WINDOW, 1.0, 1, False, raise_error_at_min_scale=False)
    weight = torch.nn.Parameter(torch.zeros(1))
    ours = ClippedAdamW([{"params": [weight]}], clip_grad_norm=0.0, tensor=ALONE, dynamic_loss_scale=True)
    generator = random.Random(0)
    for step in range(5 * LOSS_SCALE_WINDOW):
        ours.overflow = generator.random() < (0.1 if step < 100 else 0.0005)
        theirs.update_scale(ours.overflow)
        ours._update_loss_scale()
        assert theirs.cur_scale == ours.loss_scale
        assert read_good_steps(theirs) == ours.good_steps
    return ours.loss_scale


def test_the_good_steps_of_deepspeeds_loss_scale_are_ours() -> None:
    """The scale doubles and halves at the same steps."""
    assert run_on_ranks(1, compare_loss_scales)[0] > 1.0  # in a rank, for DeepSpeed asks which one logs an overflow
