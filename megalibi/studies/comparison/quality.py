"""Part two of the comparison: the models trained to equal updates, and the perplexity of their checkpoints."""

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
from megalibi.studies.comparison.study import ALIBI, CompareStudy, Model, model_config
from megalibi.studies.machinery.machine import Machine
from megalibi.studies.machinery.scorings import Scoring, run_scorings
from megalibi.studies.machinery.trainings import Training, run_trainings


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What a trained model came to."""

    model: Model
    wall_seconds: float
    """Sum of the times of its steps as they were, on a machine that may have done other work too."""
    perplexities: Mapping[int, Mapping[int, float]]
    """By updates done, then by evaluation length."""

    @property
    def updates(self) -> int:
        """Of the last checkpoint."""
        return max(self.perplexities)

    def final(self, length: int) -> float | None:
        """Return the last checkpoint's perplexity; None if it has not been evaluated at this length."""
        return self.perplexities[self.updates].get(length)

    def points(self, length: int, update_seconds: float) -> list[Point]:
        """Return the perplexity at one evaluation length against time.

        Args:
            length: Tokens the model sees at once.
            update_seconds: What an update takes.
        """
        return [
            Point(updates=updates, hours=updates * update_seconds / 3600.0, perplexity=by_length[length])
            for updates, by_length in sorted(self.perplexities.items())
            if length in by_length
        ]


def check_quality(base: Config) -> None:
    """Find out before anything runs whether the study's runs will have what part two reads.

    Raises:
        ConfigError: They would not keep their checkpoints, or there is not one validation text.
    """
    if base.checkpoint.keep != 0 or base.checkpoint.every_steps < 1:
        raise ConfigError(
            f"checkpoint.keep={base.checkpoint.keep} with checkpoint.every_steps={base.checkpoint.every_steps} is not "
            "allowed: the curves need all checkpoints, keep=0 and every_steps of at least 1"
        )
    if len(base.data.valid) != 1:
        raise ConfigError(f"data.valid has {len(base.data.valid)} token files: a comparison is evaluated on one")


def train_models(base: Config, study: CompareStudy, machine: Machine, console: Console) -> None:
    """Train what is not trained yet, as runs.py does.

    Args:
        base: The study's configuration.
        study: Its section.
        machine: Where to train.
        console: Where to show progress.
    """
    trainings = [Training(config=model_config(base, model), machine=machine) for model in study.models()]
    run_trainings(trainings, console)


def plan_scorings(base: Config, study: CompareStudy, machine: Machine) -> dict[Model, dict[int, Scoring]]:
    """Return the evaluation of every checkpoint there is, by model and updates.

    All checkpoints of a pair are evaluated at the longer model's length (Figure 5). The last ones are evaluated at
    every training length from their own on (Table 12), and ALiBi's at twice and four times the longest, too.

    Args:
        base: The study's configuration.
        study: Its section.
        machine: Where to evaluate.
    """
    plan: dict[Model, dict[int, Scoring]] = {}
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


def evaluate_models(plan: Mapping[Model, Mapping[int, Scoring]], console: Console) -> None:
    """Evaluate what is not evaluated yet.

    Args:
        plan: From plan_scorings.
        console: Where to show progress.
    """
    run_scorings([evaluation for of_model in plan.values() for evaluation in of_model.values()], console)


def read_qualities(base: Config, plan: Mapping[Model, Mapping[int, Scoring]]) -> dict[Model, Quality]:
    """Return what is known of the models that are trained to their last update and evaluated.

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
