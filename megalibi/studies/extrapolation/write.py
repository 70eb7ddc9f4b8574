"""The files that an extrapolation study writes: results.json, table.md and two pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megalibi.config import Config, config_to_dict
from megalibi.files import make_folder, write_aside, write_json
from megalibi.metrics.provenance import describe_run
from megalibi.metrics.records import read_metrics
from megalibi.metrics.summary import summarize
from megalibi.report.plots import save_figure
from megalibi.studies.baselines import describe_sinusoidal, describe_t5_bias
from megalibi.studies.extrapolation.evaluations import ResultsBySeed, final_runs, perplexities_of, position_columns
from megalibi.studies.extrapolation.plot import extrapolation_figure, loss_by_position_figure
from megalibi.studies.extrapolation.positions import spread_positions
from megalibi.studies.extrapolation.report import format_extrapolation
from megalibi.studies.extrapolation.study import INTERPOLATED, METHOD_NAMES, ExtrapolationStudy, method_config
from megalibi.studies.extrapolation.sweep import Sweep
from megalibi.studies.finding import Finding
from megalibi.studies.machinery.trainings import find_divergence
from megalibi.units import format_count, format_duration


def describe_training(config: Config) -> dict[str, Any]:
    """Return the last loss, the tokens and the time of a run, from its metrics, or the step at which it diverged."""
    about = {"learning_rate": config.optimizer.learning_rate, "seed": config.train.seed}
    if (step := find_divergence(config)) is not None:
        return {**about, "diverged_at_step": step}
    summary = summarize(read_metrics(config.train.output_dir))
    if summary is None:
        return about
    return {
        **about,
        "steps": summary.steps,
        "tokens": summary.tokens,
        "loss": summary.loss,
        "validation_loss": summary.validation.validation_loss if summary.validation else None,
        "tokens_per_second": summary.tokens_per_second.median,
        "seconds": summary.train_seconds,
    }


def describe_trainings(
    study: ExtrapolationStudy, base: Config, sweeps: Mapping[str, Sweep]
) -> dict[str, list[dict[str, Any]]]:
    """Return every run of each method: those of the sweep, then those of the other seeds.

    Args:
        study: The section ``study``.
        base: The study's run.
        sweeps: The sweep of each method.
    """
    of_rates = {m: [method_config(base, m, rate, study.seeds[0]) for rate in study.learning_rates] for m in sweeps}
    of_seeds = list(final_runs(study, base, sweeps).values())[1:]
    return {
        method: [describe_training(config) for config in (*configs, *(of_seed[method] for of_seed in of_seeds))]
        for method, configs in of_rates.items()
    }


def describe_extrapolation(
    study: ExtrapolationStudy, base: Config, trainings: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[str]:
    """Return sentences on what was trained and scored.

    Args:
        study: The section ``study``.
        base: The study's run.
        trainings: The runs of each method, from describe_trainings.
    """
    model = base.model
    tokens = base.train.steps * base.train.global_batch_size * base.data.seq_length
    seconds = {method: sum(run.get("seconds", 0.0) for run in runs) for method, runs in trainings.items()}
    times = ", ".join(f"{method} {format_duration(value)}" for method, value in seconds.items())
    seeds, rates = ", ".join(map(str, study.seeds)), ", ".join(f"{rate:g}" for rate in study.learning_rates)
    spread = (
        "values are means, in brackets the lowest and the highest" if len(study.seeds) > 1 else "no spread is known"
    )
    return [
        f"{model.num_layers} layers, {model.hidden_size} wide, {model.num_attention_heads} heads, trained at "
        f"{base.data.seq_length:,} tokens for {base.train.steps:,} steps ({format_count(tokens)} tokens, the same for "
        f"all, {base.train.precision}).",
        f"Learning rates tried for each method: {rates}. With its best one, by validation loss at the training length, "
        f"each method was trained from {format_seeds(study.seeds)} ({seeds}; n = {len(study.seeds)}): {spread}.",
        f"Scored: the first {study.nonoverlapping_tokens:,} tokens of the validation text without overlap, the first "
        f"{study.sliding_tokens:,} sliding, at every length.",
        f"Time in steps, all runs of a method together: {times}.",
        *([describe_sinusoidal(base.model)] if "sinusoidal" in study.methods else []),
        *([describe_t5_bias(base.model)] if "t5_bias" in study.methods else []),
        *([_describe_interpolated(base)] if INTERPOLATED in study.curves else []),
    ]


def _describe_interpolated(base: Config) -> str:
    return (
        f"{METHOD_NAMES[INTERPOLATED]}: the models of {METHOD_NAMES['alibi']}, their slopes multiplied by "
        f"{base.data.seq_length:,} / length when they are evaluated (position interpolation, arXiv:2310.13017); no "
        "finding is about this curve."
    )


def format_seeds(seeds: Sequence[int]) -> str:
    """Return how many seeds there are, in words."""
    return "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"


def write_extrapolation(
    output: Path,
    study: ExtrapolationStudy,
    base: Config,
    *,
    sweeps: Mapping[str, Sweep],
    results: ResultsBySeed,
    findings: Sequence[Finding],
    device: str,
) -> None:
    """Write results.json, table.md, figure.png and figure_by_position.png.

    Args:
        output: The folder for them.
        study: The section ``study``.
        base: The study's run.
        sweeps: The sweep of each method.
        results: What the evaluations found.
        findings: What follows from them.
        device: The device that computed, cuda or cpu.

    Raises:
        FileError: A file cannot be written.
    """
    curves, train_length = perplexities_of(results), base.data.seq_length
    by_position = spread_positions(position_columns(results), train_length)
    trainings = describe_trainings(study, base, sweeps)
    record = {
        **describe_run(device, ("torch", "deepspeed")),
        "study": asdict(study),
        "config": config_to_dict(base),
        "sweep": {method: describe_sweep(sweep) for method, sweep in sweeps.items()},
        "trainings": trainings,
        "results": describe_results(results),
        "by_position": {
            curve: {str(length): [asdict(spread) for spread in spreads] for length, spreads in by_length.items()}
            for curve, by_length in by_position.items()
        },
        "findings": [asdict(finding) for finding in findings],
    }
    make_folder(output)
    write_json(record, output / "results.json")
    page = format_extrapolation(
        curves,
        findings,
        by_position=by_position,
        sweeps=sweeps,
        train_length=train_length,
        stride=study.stride,
        facts=describe_extrapolation(study, base, trainings),
    )
    write_aside(output / "table.md", page)
    save_figure(extrapolation_figure(curves, train_length=train_length, stride=study.stride), output / "figure.png")
    save_figure(loss_by_position_figure(by_position, train_length=train_length), output / "figure_by_position.png")


def describe_results(results: ResultsBySeed) -> dict[str, Any]:
    """Return the results as results.json has them: without the losses at each position, which the runs' files keep."""
    return {
        str(seed): {
            protocol: {
                curve: [replace(row, by_position=None).to_dict() for row in rows.values()]
                for curve, rows in curves.items()
            }
            for protocol, curves in of_seed.items()
        }
        for seed, of_seed in results.items()
    }


def describe_sweep(sweep: Sweep) -> dict[str, Any]:
    """Return a sweep as results.json has it."""
    rows = [
        {"learning_rate": rate, "validation_loss": loss if math.isfinite(loss) else None}
        for rate, loss in sweep.losses.items()
    ]
    return {"rates": rows, "chosen": sweep.chosen, "at_edge": sweep.is_at_edge}
