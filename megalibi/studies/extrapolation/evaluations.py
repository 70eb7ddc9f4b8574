"""The evaluations of an extrapolation study: which there are, and what they found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megalibi.checkpoint import Checkpoint
from megalibi.config import Config
from megalibi.errors import DivergenceError
from megalibi.evaluate.result import EvaluationResult, read_evaluation
from megalibi.studies.extrapolation.positions import PositionColumns
from megalibi.studies.extrapolation.study import (
    INTERPOLATED,
    NONOVERLAPPING,
    PROTOCOLS,
    SLIDING,
    ExtrapolationStudy,
    SeedCurves,
    method_config,
    trained_method,
)
from megalibi.studies.extrapolation.sweep import Sweep
from megalibi.studies.machinery.machine import Machine
from megalibi.studies.machinery.scorings import Scoring
from megalibi.studies.machinery.trainings import find_divergence

ResultsBySeed = Mapping[int, Mapping[str, Mapping[str, Mapping[int, EvaluationResult]]]]
"""Seed -> protocol -> curve, by a key of METHOD_NAMES -> evaluation length -> result."""
FinalRuns = Mapping[int, Mapping[str, Config]]
"""Seed -> position method -> the run with the method's learning rate."""


def final_runs(study: ExtrapolationStudy, base: Config, sweeps: Mapping[str, Sweep]) -> FinalRuns:
    """Return the runs that are evaluated: every method with its chosen learning rate, from every seed.

    Args:
        study: The section ``study``.
        base: The study's run.
        sweeps: The sweep of each method.
    """
    return {
        seed: {method: method_config(base, method, sweeps[method].chosen, seed) for method in study.methods}
        for seed in study.seeds
    }


def check_converged(runs: FinalRuns) -> None:
    """Refuse a rate that was chosen at the first seed and diverges from another one; all runs have ended.

    Args:
        runs: The runs to evaluate.

    Raises:
        DivergenceError: Runs have diverged. The message names the first, and the rate to leave out.
    """
    for seed, of_seed in runs.items():
        for method, config in of_seed.items():
            if (step := find_divergence(config)) is not None:
                raise DivergenceError(
                    f"{method} with learning rate {config.optimizer.learning_rate:g}, its best at the first seed, has "
                    f"diverged from seed {seed} at step {step} ({config.train.output_dir}): take this rate out of "
                    "study.learning_rates, or put a lower one in its place; what else is trained is kept"
                )


def plan_evaluations(study: ExtrapolationStudy, runs: FinalRuns, machine: Machine) -> list[Scoring]:
    """Return all evaluations: quick ones first, sliding ones length by length: an interruption costs little.

    Without overlap the losses are also taken by position, for which nothing more is computed.

    Args:
        study: The section ``study``.
        runs: The runs to evaluate; all are trained to their last step.
        machine: Where to evaluate.
    """
    every = [(curve, of_seed[trained_method(curve)]) for of_seed in runs.values() for curve in study.curves]
    calls = [
        *((NONOVERLAPPING, curve, config, study.lengths_of(curve)) for curve, config in every),
        *(
            (SLIDING, curve, config, (length,))
            for length in study.lengths
            for curve, config in every
            if length in study.lengths_of(curve)
        ),
    ]
    return [
        Scoring(
            label=Path(config.train.output_dir).name + " interpolated" * (curve == INTERPOLATED),
            checkpoint=Checkpoint.open(Path(config.train.output_dir)).path,
            data=config.data.valid[0].prefix,
            protocol=protocol,
            stride=study.stride if protocol == SLIDING else None,
            tokens=study.tokens_of(protocol),
            lengths=lengths,
            slope_scale="interpolate" if curve == INTERPOLATED else None,
            by_position=protocol == NONOVERLAPPING,
            output=evaluation_path(config, protocol, curve),
            machine=machine,
        )
        for protocol, curve, config, lengths in calls
    ]


def evaluation_path(config: Config, protocol: str, curve: str) -> Path:
    """Return the file of a run's evaluations by a protocol; it is in the run's folder, where its report finds it."""
    scaled = "_interpolated" if curve == INTERPOLATED else ""
    return Path(config.train.output_dir) / f"evaluation_{protocol}{scaled}.json"


def read_evaluations(study: ExtrapolationStudy, runs: FinalRuns) -> ResultsBySeed:
    """Return every result that the study asks for.

    Args:
        study: The section ``study``.
        runs: The runs that were evaluated.
    """
    return {
        seed: {
            protocol: {
                curve: _read_lengths(study, curve, of_seed[trained_method(curve)], protocol) for curve in study.curves
            }
            for protocol in PROTOCOLS
        }
        for seed, of_seed in runs.items()
    }


def _read_lengths(study: ExtrapolationStudy, curve: str, config: Config, protocol: str) -> dict[int, EvaluationResult]:
    known = {row.length: row for row in read_evaluation(evaluation_path(config, protocol, curve)).results}
    return {length: known[length] for length in study.lengths_of(curve)}


def perplexities_of(results: ResultsBySeed) -> SeedCurves:
    """Return the perplexities of all results."""
    return {
        seed: {
            protocol: {m: {length: row.perplexity for length, row in rows.items()} for m, rows in lines.items()}
            for protocol, lines in of_seed.items()
        }
        for seed, of_seed in results.items()
    }


def position_columns(results: ResultsBySeed) -> PositionColumns:
    """Return the losses by position of all nonoverlapping results."""
    return {
        seed: {
            curve: {length: row.by_position for length, row in rows.items() if row.by_position is not None}
            for curve, rows in of_seed[NONOVERLAPPING].items()
        }
        for seed, of_seed in results.items()
    }
