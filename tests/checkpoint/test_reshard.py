from __future__ import annotations

import dataclasses
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from megalibi.checkpoint import Checkpoint, load_checkpoint
from megalibi.checkpoint.reshard import plan_reshard, reshard
from megalibi.config import Config
from megalibi.errors import CheckpointError, ConfigError
from tests.support.ranks import run_on_ranks
from tests.support.runs import build, make_config
from tests.support.saving import save, take_steps

STEPS = 3
TOPOLOGIES = [(1, 1, 1), (2, 1, 0), (1, 3, 3), (4, 2, 2)]
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def configure(prefix: str, tensor: int, stage: int) -> Config:
    return make_config(
        prefix, model={"bias": True}, parallel={"tensor_parallel_size": tensor}, zero={"stage": stage},
        train={"global_batch_size": 24},
    )  # fmt: skip


def train_and_save(config: Config, folder: str) -> None:
    engine, groups = build(config)
    take_steps(config, engine, groups, 0, STEPS)
    save(config, engine, groups, folder, STEPS)
    engine.destroy()


def go_on(config: Config, checkpoint: str) -> list[float]:
    engine, groups = build(config)
    load_checkpoint(engine, Path(checkpoint), groups)
    losses = [result.loss for result in take_steps(config, engine, groups, STEPS, STEPS + 2)]
    engine.destroy()
    return losses


@pytest.fixture(scope="module")
def checkpoint(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Of two tensor and two data ranks at ZeRO 1."""
    folder = tmp_path_factory.mktemp("run")
    run_on_ranks(4, train_and_save, configure(prefix, 2, 1), str(folder))
    return Checkpoint.open(folder)


@pytest.mark.parametrize(("tensor", "data", "stage"), TOPOLOGIES)
def test_every_bit_is_there_and_back_again(
    checkpoint: Checkpoint, tmp_path: Path, tensor: int, data: int, stage: int
) -> None:
    sizes: dict[str, Any] = {"tensor_parallel_size": tensor, "data_parallel_size": data, "zero_stage": stage}
    reshard(checkpoint, tmp_path / "there", plan_reshard(checkpoint, **sizes))
    there = Checkpoint.open(tmp_path / "there")
    there.verify()
    assert there.manifest.topology == {"world_size": tensor * data, **sizes}
    assert there.config.parallel.tensor_parallel_size == tensor
    assert there.config.zero.stage == stage
    assert len(there.manifest.files) == 2 * tensor * data
    plan = plan_reshard(there, tensor_parallel_size=2, data_parallel_size=2, zero_stage=1)
    reshard(there, tmp_path / "back", plan)
    back = Checkpoint.open(tmp_path / "back")
    assert back.manifest.topology == checkpoint.manifest.topology
    assert back.parameters == checkpoint.parameters
    for name in checkpoint.parameters:
        for kind in KINDS:
            tensor_before = checkpoint.read_state().read_whole(name, kind)
            assert torch.equal(there.read_state().read_whole(name, kind), tensor_before)
            assert torch.equal(back.read_state().read_whole(name, kind), tensor_before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "there"]


def test_a_run_goes_on_from_it_as_from_the_first(checkpoint: Checkpoint, prefix: str, tmp_path: Path) -> None:
    plan = plan_reshard(checkpoint, tensor_parallel_size=1, data_parallel_size=2, zero_stage=3)
    reshard(checkpoint, tmp_path / "new", plan)
    config = configure(prefix, 1, 3)
    ways = [run_on_ranks(2, go_on, config, str(path)) for path in (checkpoint.path, tmp_path / "new")]
    assert ways[0] == ways[1]


def test_what_cannot_be_is_one_line(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="size=3: must divide model"):
        plan_reshard(checkpoint, tensor_parallel_size=3, data_parallel_size=1, zero_stage=1)


def test_damage_is_named_before_anything_is_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = plan_reshard(checkpoint, tensor_parallel_size=1, data_parallel_size=1, zero_stage=1)
    name = min(checkpoint.manifest.files)
    path = checkpoint.path / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(CheckpointError, match=f"{path} is damaged"):
            reshard(checkpoint, tmp_path / "new", plan)
    finally:
        path.write_bytes(whole)
    assert list(tmp_path.iterdir()) == []


def test_a_micro_batch_that_does_not_fit_becomes_smaller(checkpoint: Checkpoint) -> None:
    """As a resume may have it: 24 sequences over 24 data ranks."""
    plan = plan_reshard(checkpoint, tensor_parallel_size=1, data_parallel_size=24, zero_stage=1)
    assert (checkpoint.config.train.micro_batch_size, plan.config.train.micro_batch_size) == (2, 1)
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=24: must be a multiple of"):
        plan_reshard(checkpoint, tensor_parallel_size=1, data_parallel_size=7, zero_stage=1)


def test_more_files_than_a_process_may_have_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    plan = plan_reshard(checkpoint, tensor_parallel_size=1, data_parallel_size=24, zero_stage=1)
    with pytest.raises(ConfigError, match="raise `ulimit -Hn`, or take fewer ranks"):
        plan_reshard(checkpoint, tensor_parallel_size=1, data_parallel_size=hard, zero_stage=1)
    with pytest.raises(ConfigError, match="raise `ulimit -Hn`, or take fewer ranks"):
        reshard(checkpoint, tmp_path / "new", dataclasses.replace(plan, data_parallel_size=hard))
    assert list(tmp_path.iterdir()) == []


def test_what_fails_half_way_leaves_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = plan_reshard(checkpoint, tensor_parallel_size=1, data_parallel_size=1, zero_stage=1)

    def interrupt(name: str, done: int, total: int) -> None:
        if done == total // 2:
            (partial,) = tmp_path.iterdir()
            assert partial.name.startswith("new.partial.")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard(checkpoint, tmp_path / "new", plan, show=interrupt)
    assert list(tmp_path.iterdir()) == []
