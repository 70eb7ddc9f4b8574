"""Train short, test long: train a model for each position method, evaluate all past their training length, compare.

Trains a model with each of study.methods at data.seq_length, evaluates it at study.lengths by both protocols, and
writes what the paper's Figure 4 shows: results.json, table.md and figure.png. After an interruption the same command
resumes: finished trainings and evaluations are not done again.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from megalibi.cli.command import Command, add_overrides
from megalibi.cli.study.root import find_root
from megalibi.config import Config, config_to_dict
from megalibi.evaluate.result import EvaluationResult, read_evaluation
from megalibi.files import make_folder, write_aside, write_json
from megalibi.metrics.provenance import describe_run
from megalibi.metrics.records import read_metrics
from megalibi.metrics.summary import summarize
from megalibi.report.plots import save_figure
from megalibi.runtime.outputs import check_folder
from megalibi.studies.extrapolation.findings import judge_extrapolation
from megalibi.studies.extrapolation.plot import extrapolation_figure
from megalibi.studies.extrapolation.report import format_report
from megalibi.studies.extrapolation.study import (
    NONOVERLAPPING,
    PROTOCOLS,
    SLIDING,
    Curves,
    ExtrapolationStudy,
    method_config,
)
from megalibi.studies.finding import Finding
from megalibi.studies.machinery.machine import Machine, detect_machine
from megalibi.studies.study import load_study
from megalibi.units import format_count, format_duration

if TYPE_CHECKING:
    from megalibi.studies.machinery.scorings import Scoring

RESULT_FILES = ("results.json", "table.md", "figure.png")
EXAMPLES = """examples:
  {command} configs/extrapolation_small.yaml --jobs 2
  {command} configs/extrapolation_small.yaml study.methods=[alibi,rotary] train.steps=200 \\
      train.output_dir=runs/extrapolation_short
"""
Results = dict[str, dict[str, dict[int, EvaluationResult]]]
"""Protocol -> method -> length -> result."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a study's YAML: a run, and the section study")
    add_overrides(parser)
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes that run at once (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: results/ and the name of CONFIG")
    parser.add_argument(
        "--launcher",
        default="",
        metavar="COMMAND",
        help="what starts the ranks of a training: 'srun python', for example",
    )


def plan_scorings(
    study: ExtrapolationStudy, base: Config, checkpoints: dict[str, Path], machine: Machine
) -> list[Scoring]:
    """Return all evaluations: quick ones first, sliding ones length by length: an interruption costs little."""
    from megalibi.studies.machinery.scorings import Scoring

    calls = [
        *((NONOVERLAPPING, method, study.lengths_of(method)) for method in study.methods),
        *((SLIDING, method, (n,)) for n in study.lengths for method in study.methods if n in study.lengths_of(method)),
    ]
    return [
        Scoring(
            label=method,
            checkpoint=checkpoints[method],
            data=base.data.valid[0].prefix,
            protocol=protocol,
            stride=study.stride if protocol == SLIDING else None,
            tokens=study.tokens_of(protocol),
            lengths=lengths,
            output=evaluation_path(base, method, protocol),
            machine=machine,
        )
        for protocol, method, lengths in calls
    ]


def evaluation_path(base: Config, method: str, protocol: str) -> Path:
    """Return the file of a run's evaluations by a protocol; it is in the run's folder, where its report finds it."""
    return Path(method_config(base, method).train.output_dir) / f"evaluation_{protocol}.json"


def read_results(study: ExtrapolationStudy, base: Config) -> Results:
    """Return every result that the study asks for."""
    results: Results = {}
    for protocol in PROTOCOLS:
        for method in study.methods:
            known = {row.length: row for row in read_evaluation(evaluation_path(base, method, protocol)).results}
            rows = {length: known[length] for length in study.lengths_of(method)}
            results.setdefault(protocol, {})[method] = rows
    return results


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


def describe_study(study: ExtrapolationStudy, base: Config, trainings: dict[str, dict[str, Any]]) -> list[str]:
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


def write_results(
    output: Path, study: ExtrapolationStudy, base: Config, results: Results, findings: list[Finding], curves: Curves
) -> None:
    """Write results.json, table.md and figure.png."""
    trainings = {method: describe_training(base, method) for method in study.methods}
    record = {
        **describe_run("cuda" if torch.cuda.is_available() else "cpu", ("torch", "deepspeed")),
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
    page = format_report(
        curves,
        findings,
        train_length=base.data.seq_length,
        stride=study.stride,
        facts=describe_study(study, base, trainings),
    )
    write_aside(output / "table.md", page)
    figure = extrapolation_figure(curves, train_length=base.data.seq_length, stride=study.stride)
    save_figure(figure, output / "figure.png")


def run(arguments: argparse.Namespace) -> None:
    """Check everything, train, evaluate, write the results, and print the findings."""
    study, base = load_study(arguments.config, arguments.overrides, ExtrapolationStudy)
    study.check_base(base)
    machine = detect_machine(os.environ, jobs=arguments.jobs, ranks=study.ranks, launcher=arguments.launcher)
    output = arguments.output or find_root() / "results" / arguments.config.stem
    check_folder(output, "--output", files=RESULT_FILES)
    if machine.gpus == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns of no GPU
    # After that: they import DeepSpeed.
    from megalibi.studies.machinery.scorings import run_scorings
    from megalibi.studies.machinery.trainings import Training, run_trainings

    console = Console(highlight=False, soft_wrap=True)
    trainings = [Training(config=method_config(base, method), machine=machine) for method in study.methods]
    checkpoints = run_trainings(trainings, console)
    run_scorings(plan_scorings(study, base, checkpoints, machine), console)
    results = read_results(study, base)
    curves = {
        protocol: {m: {length: row.perplexity for length, row in rows.items()} for m, rows in of_protocol.items()}
        for protocol, of_protocol in results.items()
    }
    findings = judge_extrapolation(curves, base.data.seq_length)
    write_results(output, study, base, results, findings, curves)
    for finding in findings:
        print(finding)
    print(f"results: {output}/results.json, table.md, figure.png")


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
