"""The trainings of a study: each is a process of ``megalibi pretrain``, and none is done twice.

A study's folder has for each run NAME.yaml (its configuration, which a user could start by hand), NAME.log (its output)
and NAME/ (its train.output_dir).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megalibi.checkpoint import CHECKPOINTS, LATEST, Checkpoint, find_checkpoint
from megalibi.config import (
    NO_WEIGHT_DEPENDS_ON,
    Config,
    config_from_dict,
    config_to_dict,
    find_differences,
    load_config,
    save_config,
)
from megalibi.errors import ConfigError, FileError, UserError
from megalibi.files import read_json_object, rename_synced
from megalibi.log import get_logger
from megalibi.metrics.records import CONFIG_FILE, DIVERGED_FILE, METRICS_FILE, StepRecord, parse_line
from megalibi.studies.machinery.jobs import JobProgress, run_jobs
from megalibi.studies.machinery.machine import Machine
from megalibi.train.check import check_run
from megalibi.units import format_count, format_duration

_LOGGER = get_logger(__name__)
_DECIDE_DIVERGENCE = {"train.on_nonfinite", "train.max_consecutive_skips"}
"""Fields that change no weight, and whether a run goes on at a number that is not finite."""
_TAIL_BYTES = 1 << 14  # some forty lines of metrics.jsonl


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training; ``train.output_dir`` of its configuration is FOLDER/NAME."""

    config: Config
    """The configuration of the run."""
    machine: Machine
    """The machine to train on."""
    free: Collection[str] = NO_WEIGHT_DEPENDS_ON
    """Fields, as ``section.field``, in which a finished run may differ from this one and stand for it."""
    may_diverge: bool = False
    """Whether a run that diverges is a result, as that of a learning rate on trial is."""

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.config.train.output_dir)

    @property
    def name(self) -> str:
        """The name of the training on the console."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """The file that gets the output of the process."""
        return self.folder.parent / f"{self.name}.log"

    @property
    def config_path(self) -> Path:
        """The YAML file that it is started with."""
        return self.folder.parent / f"{self.name}.yaml"

    def prepare(self) -> None:
        """Write the YAML file."""
        save_config(self.config, self.config_path)

    def command(self, slot: int) -> list[str]:
        """Return the command that trains."""
        return [*self.machine.launch(slot, "pretrain"), "--config", str(self.config_path)]

    def environment(self, slot: int) -> dict[str, str]:
        """Return the environment to train in."""
        return self.machine.environment_of(slot, self.machine.ranks)

    def progress(self) -> JobProgress | None:
        """Return how far the training is, from metrics.jsonl."""
        records = _read_last_steps(self.folder / METRICS_FILE)
        if not records:
            return None
        last, total = records[-1], self.config.train.steps
        left = (total - last.step) * sum(record.step_seconds for record in records) / len(records)
        words = f"step {last.step}/{total} | loss {last.loss:.4f} | {format_count(last.tokens_per_second)} tokens/s"
        return JobProgress(done=last.step, total=total, words=f"{words} | {format_duration(left)} left")

    def finish(self, exit_code: int) -> str | None:
        """Return what went wrong. The last step's checkpoint decides: launchers have exit codes of their own."""
        checkpoint = find_checkpoint(self.folder / CHECKPOINTS)
        if checkpoint is not None and Checkpoint.open(checkpoint).manifest.step >= self.config.train.steps:
            return None
        if self.may_diverge and (step := find_divergence(self.config)) is not None:
            _LOGGER.warning("%s has diverged at step %d", self.name, step)
            return None
        return f"failed with exit code {exit_code}" if exit_code else "was stopped before its last step"

    def find_finished(self) -> Path | None:
        """Return the checkpoint of the last step, or None: then the run begins, or continues from an earlier one.

        A damaged newest checkpoint is moved aside with a warning, and the run continues from the one before it.

        Raises:
            ConfigError: The run has a checkpoint of another configuration.
        """
        while (checkpoint := find_checkpoint(self.folder / CHECKPOINTS)) is not None:
            try:
                opened = Checkpoint.open(checkpoint)
                damage = next(opened.find_damage(), None)
            except UserError as error:
                damage = str(error)
            if damage is None:
                check_unchanged(self.config, opened.manifest.config, free=self.free, what=f"{self.folder} was trained")
                return checkpoint if opened.manifest.step >= self.config.train.steps else None
            _LOGGER.warning("%s; moved aside to %s", damage, _move_aside(checkpoint))
        return None

    def has_ended(self) -> bool:
        """Return whether there is nothing left to train: the last step is saved, or the run may diverge and has.

        Raises:
            ConfigError: The run has a checkpoint, or a config.yaml where it has diverged, of another configuration.
            FileError: Its diverged.json cannot be read.
        """
        if self.find_finished() is not None:
            return True
        if not self.may_diverge or find_divergence(self.config) is None:
            return False
        saved = config_to_dict(load_config(self.folder / CONFIG_FILE))
        free = set(self.free) - _DECIDE_DIVERGENCE
        check_unchanged(self.config, saved, free=free, what=f"{self.folder} has diverged")
        return True


def find_divergence(config: Config) -> int | None:
    """Return the step at which the last start of a run has diverged, as diverged.json has it, or None.

    Args:
        config: The configuration of the run.

    Raises:
        FileError: The file is there and has no step.
    """
    path = Path(config.train.output_dir) / DIVERGED_FILE
    if not path.exists():
        return None
    step = read_json_object(path).get("step")
    if not isinstance(step, int):
        raise FileError(f"{path}: has no step; delete it to train that run again")
    return step


def check_unchanged(config: Config, saved: Mapping[str, Any], *, free: Collection[str], what: str) -> None:
    """Refuse results of another configuration.

    Args:
        config: The configuration that the study wants.
        saved: The configuration that the results were made with, as a manifest or a JSON file has it.
        free: Fields, as ``section.field``, on which the results do not depend.
        what: The beginning of the message: the results, and how they were made.

    Raises:
        ConfigError: Fields that matter differ. The message names them with both values.
    """
    differences = find_differences(config_from_dict(dict(saved)), config)
    changed = [f"{field}={ours}, not {theirs}" for field, (theirs, ours) in differences.items() if field not in free]
    if changed:
        raise ConfigError(
            f"{what} with another configuration than this study's: {'; '.join(changed)}; give the values of that "
            "configuration, or another train.output_dir"
        )


def _move_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint so that nothing takes it for one, and remove ``latest``: the newest that is left counts."""
    aside = checkpoint.with_name(checkpoint.name + ".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    rename_synced(checkpoint, aside)
    checkpoint.with_name(LATEST).unlink(missing_ok=True)
    return aside


def _read_last_steps(path: Path) -> list[StepRecord]:
    """Return the records of the last steps in metrics.jsonl; none if there is no file."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines(keepends=True)
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the first and the last line may be cut
            records.append(parse_line(line))
    return [record for record in records if isinstance(record, StepRecord)]


def run_trainings(trainings: Sequence[Training], console: Console) -> None:
    """Train everything that is not trained yet; interrupted runs continue.

    Args:
        trainings: The trainings, all on the same machine.
        console: Where to show progress.

    Raises:
        ConfigError: A configuration cannot be used, or differs from that of the run's checkpoints. Nothing has started.
        JobError: A training failed; the others have ended before.
    """
    missing = [training for training in trainings if not training.has_ended()]
    for training in missing:
        check_run(training.config, training.machine.ranks)
    ended = [training for training in trainings if training not in missing]
    for line in _describe_ended(ended):
        console.print(line, highlight=False, soft_wrap=True)
    if missing:
        run_jobs(missing, at_once=missing[0].machine.jobs, console=console)


def _describe_ended(ended: Sequence[Training]) -> Iterator[str]:
    """Yield lines on the trainings that are not started again."""
    diverged = {training.name: find_divergence(training.config) for training in ended}
    if done := [name for name, step in diverged.items() if step is None]:
        yield f"trained already: {', '.join(done)}"
    for training in ended:
        if (step := diverged[training.name]) is not None:
            yield (
                f"{training.name} has diverged at step {step}, and is not trained again; to try it once more delete "
                f"{training.folder / DIVERGED_FILE}"
            )
