"""Steps of an engine on this rank, and a save of it; imported in the ranks."""

from __future__ import annotations

from pathlib import Path

from deepspeed.runtime.engine import DeepSpeedEngine

from megalibi.checkpoint import CheckpointSaver, SavedRun, save_checkpoint
from megalibi.config import Config, derive, learning_rate_at
from megalibi.engine.step import StepResult, train_step
from megalibi.parallel import ProcessGroups
from tests.support.runs import CPU, identify, open_loader


def take_steps(
    config: Config, engine: DeepSpeedEngine, groups: ProcessGroups, first: int, last: int
) -> list[StepResult]:
    loader = open_loader(config, data_rank=groups.data.rank, data_size=groups.data.size)
    batch = config.train.global_batch_size
    results = [
        train_step(
            engine,
            loader.micro_batches(step * batch),
            groups=groups,
            device=CPU,
            learning_rate=learning_rate_at(step, config.optimizer, config.train.steps),
            seed=config.train.seed,
            samples_consumed=step * batch,
        )
        for step in range(first, last)
    ]
    loader.close()
    return results


def save(config: Config, engine: DeepSpeedEngine, groups: ProcessGroups, folder: str, step: int) -> Path:
    derived = derive(config, groups.world.size)
    return save_checkpoint(
        engine, config, derived, identify(config), groups, folder=Path(folder), step=step, run_id="a"
    )


def make_saver(config: Config, engine: DeepSpeedEngine, groups: ProcessGroups, folder: Path) -> CheckpointSaver:
    derived = derive(config, groups.world.size)
    return CheckpointSaver(
        SavedRun(
            engine=engine,
            config=config,
            derived=derived,
            data=identify(config),
            groups=groups,
            folder=folder,
            run_id="a",
        )
    )
