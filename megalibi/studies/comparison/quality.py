"""Part two of the comparison: all models are trained for equally many updates, and their checkpoints evaluated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megalibi.checkpoint import CHECKPOINTS, Checkpoint, list_checkpoints
from megalibi.config import Config
from megalibi.errors import ConfigError
from megalibi.metrics.records import read_metrics
from megalibi.studies.comparison.curves import Point
from megalibi.studies.comparison.study import ALIBI, ComparedModel, CompareStudy, model_config
from megalibi.studies.machinery.machine import Machine
from megalibi.studies.machinery.scorings import Scoring, run_scorings
from megalibi.studies.machinery.trainings import Training, run_trainings


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good a trained model is, checkpoint by checkpoint."""

    model: ComparedModel
    """The model that was trained."""
    wall_seconds: float
    """Sum of the seconds of its steps, on a machine that may have done other work at the same time."""
    perplexities: Mapping[int, Mapping[int, float]]
    """Updates done -> evaluation length -> perplexity."""

    @property
    def updates(self) -> int:
        """Updates of the last checkpoint."""
        return max(self.perplexities)

    def final(self, length: int) -> float | None:
        """Return the perplexity of the last checkpoint, or None if it has not been evaluated at this length."""
        return self.perplexities[self.updates].get(length)

    def points(self, length: int, update_seconds: float) -> list[Point]:
        """Return the checkpoints evaluated at one length, by rising time.

        Args:
            length: The evaluation length in tokens.
            update_seconds: Seconds of an update.
        """
        return [
            Point(updates=updates, hours=updates * update_seconds / 3600.0, perplexity=by_length[length])
            for updates, by_length in sorted(self.perplexities.items())
            if length in by_length
        ]


def check_quality(base: Config) -> None:
    """Check, before anything runs, that the runs will leave what part two reads.

    Raises:
        ConfigError: The runs would not keep all checkpoints, or data.valid is not one token file.
    """
    if base.checkpoint.keep != 0 or base.checkpoint.every_steps < 1:
        raise ConfigError(
            f"checkpoint.keep={base.checkpoint.keep} with checkpoint.every_steps={base.checkpoint.every_steps}: must "
            "be keep=0 and every_steps of at least 1, because the curves need all checkpoints"
        )
    if len(base.data.valid) != 1:
        raise ConfigError(f"data.valid: must be one token file to evaluate on, not {len(base.data.valid)}")


def train_models(base: Config, study: CompareStudy, machine: Machine, console: Console) -> None:
    """Train every model that is not trained yet.

    Args:
        base: The study's configuration.
        study: Its section ``study``.
        machine: Where to train.
        console: Where to show progress.
    """
    trainings = [Training(config=model_config(base, model), machine=machine) for model in study.models()]
    run_trainings(trainings, console)


def plan_scorings(base: Config, study: CompareStudy, machine: Machine) -> dict[ComparedModel, dict[int, Scoring]]:
    """Return the evaluation of every checkpoint that there is, by model and updates.

    All checkpoints of a pair are evaluated at the training length of the longer model (Figure 5). A last checkpoint is
    also evaluated at its own training length and all longer ones (Table 12), and ALiBi's at twice and four times the
    longest as well.

    Args:
        base: The study's configuration.
        study: Its section ``study``.
        machine: Where to evaluate.
    """
    plan: dict[ComparedModel, dict[int, Scoring]] = {}
    for model in study.models():
        config = model_config(base, model)
        of_pairs = {long.length for short, long in study.pairs() if model in (short, long)}
        table = {length for length in study.lengths if length >= model.length}
        if model.method == ALIBI:
            table |= {2 * study.lengths[-1], study.longest_evaluation}
        plan[model] = {}
        for checkpoint in list_checkpoints(Path(config.train.output_dir) / CHECKPOINTS):
            updates = Checkpoint.open(checkpoint).manifest.step
            lengths = of_pairs | table if updates == config.train.steps else of_pairs
            if lengths and updates <= config.train.steps:
                plan[model][updates] = Scoring(
                    label=f"{model.name} {checkpoint.name}",
                    checkpoint=checkpoint,
                    data=base.data.valid[0].prefix,
                    protocol="nonoverlapping",
                    tokens=study.valid_tokens,
                    lengths=tuple(sorted(lengths)),
                    output=Path(config.train.output_dir) / "evaluations" / f"{checkpoint.name}.json",
                    machine=machine,
                )
    return plan


def evaluate_models(plan: Mapping[ComparedModel, Mapping[int, Scoring]], console: Console) -> None:
    """Evaluate every checkpoint that is not evaluated yet.

    Args:
        plan: From plan_scorings.
        console: Where to show progress.
    """
    run_scorings([evaluation for of_model in plan.values() for evaluation in of_model.values()], console)


def read_qualities(base: Config, plan: Mapping[ComparedModel, Mapping[int, Scoring]]) -> dict[ComparedModel, Quality]:
    """Return the qualities of the models that are trained to their last update and evaluated.

    Args:
        base: The study's configuration.
        plan: From plan_scorings.
    """
    qualities = {}
    for model, evaluations in plan.items():
        config = model_config(base, model)
        done = {updates: _read(e) for updates, e in evaluations.items() if e.is_finished()}
        if config.train.steps in done:
            steps = read_metrics(config.train.output_dir).steps
            qualities[model] = Quality(
                model=model, wall_seconds=sum(step.step_seconds for step in steps), perplexities=done
            )
    return qualities


def _read(evaluation: Scoring) -> dict[int, float]:
    results: Sequence[Mapping[str, float]] = json.loads(evaluation.output.read_text(encoding="utf-8"))["results"]
    return {int(result["length"]): float(result["perplexity"]) for result in results}
