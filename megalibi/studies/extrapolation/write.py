"""The files that an extrapolation study writes: results.json, table.md and figure.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megalibi.config import Config, config_to_dict
from megalibi.files import make_folder, write_aside, write_json
from megalibi.metrics.provenance import describe_run
from megalibi.metrics.records import read_metrics
from megalibi.metrics.summary import summarize
from megalibi.report.plots import save_figure
from megalibi.studies.extrapolation.evaluations import ResultsByMethod
from megalibi.studies.extrapolation.plot import extrapolation_figure
from megalibi.studies.extrapolation.report import format_extrapolation
from megalibi.studies.extrapolation.study import Curves, ExtrapolationStudy, method_config
from megalibi.studies.finding import Finding
from megalibi.units import format_count, format_duration


def describe_training(base: Config, method: str) -> dict[str, Any]:
    """Return the last loss, the tokens and the time of a run, from its metrics."""
    summary = summarize(read_metrics(method_config(base, method).train.output_dir))
    if summary is None:
        return {}
    return {
        "steps": summary.steps,
        "tokens": summary.tokens,
        "loss": summary.loss,
        "validation_loss": summary.validation.validation_loss if summary.validation else None,
        "tokens_per_second": summary.tokens_per_second.median,
        "seconds": summary.train_seconds,
    }


def describe_extrapolation(
    study: ExtrapolationStudy, base: Config, trainings: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return sentences on what was trained and scored."""
    model = base.model
    tokens = base.train.steps * base.train.global_batch_size * base.data.seq_length
    seconds = {method: training["seconds"] for method, training in trainings.items() if training}
    times = ", ".join(f"{method} {format_duration(value)}" for method, value in seconds.items())
    return [
        f"{model.num_layers} layers, {model.hidden_size} wide, {model.num_attention_heads} heads, trained at "
        f"{base.data.seq_length:,} tokens for {base.train.steps:,} steps ({format_count(tokens)} tokens, the same for "
        f"all, {base.train.precision}, seed {base.train.seed}). One run of each method (n = 1): no spread is known.",
        f"Scored: the first {study.nonoverlapping_tokens:,} tokens of the validation text without overlap, the first "
        f"{study.sliding_tokens:,} sliding.",
        f"Time in steps: {times}.",
    ]


def write_extrapolation(
    output: Path,
    study: ExtrapolationStudy,
    base: Config,
    *,
    results: ResultsByMethod,
    findings: Sequence[Finding],
    curves: Curves,
    device: str,
) -> None:
    """Write results.json, table.md and figure.png.

    Args:
        output: The folder for them.
        study: The section ``study``.
        base: The study's run.
        results: What the evaluations found.
        findings: What follows from the curves.
        curves: The perplexities of the results.
        device: The device that computed, cuda or cpu.

    Raises:
        FileError: A file cannot be written.
    """
    trainings = {method: describe_training(base, method) for method in study.methods}
    record = {
        **describe_run(device, ("torch", "deepspeed")),
        "study": asdict(study),
        "config": config_to_dict(base),
        "seeds_per_method": 1,
        "trainings": trainings,
        "results": {
            protocol: {method: [row.to_dict() for row in rows.values()] for method, rows in of_protocol.items()}
            for protocol, of_protocol in results.items()
        },
        "findings": [asdict(finding) for finding in findings],
    }
    make_folder(output)
    write_json(record, output / "results.json")
    page = format_extrapolation(
        curves,
        list(findings),
        train_length=base.data.seq_length,
        stride=study.stride,
        facts=describe_extrapolation(study, base, trainings),
    )
    write_aside(output / "table.md", page)
    figure = extrapolation_figure(curves, train_length=base.data.seq_length, stride=study.stride)
    save_figure(figure, output / "figure.png")
