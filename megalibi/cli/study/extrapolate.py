"""Train short, test long: train models with each position method, evaluate them past their training length, compare.

Trains each of study.methods at data.seq_length with each of study.learning_rates, and with the best of them from each
of study.seeds. Evaluates the models of the best rates at study.lengths by both protocols and by position, with
study.interpolate_slopes those of ALiBi with interpolated slopes too, and writes what the paper's Figure 4 shows:
results.json, table.md, figure.png and figure_by_position.png. After an interruption the same command resumes: finished
trainings and evaluations are not done again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console

from megalibi.cli.command import Command, add_overrides
from megalibi.cli.study.root import find_root
from megalibi.config import Config
from megalibi.runtime.outputs import check_folder
from megalibi.studies.extrapolation.study import EXTRAPOLATION_FILES, ExtrapolationStudy, method_config
from megalibi.studies.machinery.machine import detect_machine
from megalibi.studies.study import load_study

EXAMPLES = """examples:
  {command} configs/extrapolation_small.yaml --jobs 2
  {command} configs/extrapolation_small.yaml study.methods=[alibi,rotary] train.steps=200 \\
      train.output_dir=runs/extrapolation_short
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a study's YAML: a run, and the section study")
    add_overrides(parser)
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="trainings or evaluations that run at once; of one rank each, several share a GPU where there are fewer "
        "GPUs (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: results/ and the name of CONFIG")
    parser.add_argument(
        "--launcher",
        default="",
        metavar="COMMAND",
        help="what starts the ranks of a training: 'srun python', for example",
    )


def run(arguments: argparse.Namespace) -> None:
    """Check everything, train, evaluate, write the results, and print the findings."""
    study, base = load_study(arguments.config, arguments.overrides, ExtrapolationStudy)
    study.check_base(base)
    machine = detect_machine(
        os.environ, jobs=arguments.jobs, ranks=study.ranks, launcher=arguments.launcher, shares_gpus=True
    )
    output = arguments.output or find_root() / "results" / arguments.config.stem
    check_folder(output, "--output", files=EXTRAPOLATION_FILES)
    if machine.gpus == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns of no GPU
    # After that: they import DeepSpeed.
    from megalibi.studies.extrapolation.evaluations import (
        check_converged,
        final_runs,
        perplexities_of,
        plan_evaluations,
        read_evaluations,
    )
    from megalibi.studies.extrapolation.findings import judge_extrapolation
    from megalibi.studies.extrapolation.sweep import FREE, read_sweeps
    from megalibi.studies.extrapolation.write import write_extrapolation
    from megalibi.studies.machinery.scorings import run_scorings
    from megalibi.studies.machinery.trainings import Training, run_trainings

    console = Console(highlight=False, soft_wrap=True)

    def train(configs: Iterable[Config]) -> None:
        run_trainings([Training(config=c, machine=machine, free=FREE, may_diverge=True) for c in configs], console)

    first = study.seeds[0]
    train(method_config(base, method, rate, first) for method in study.methods for rate in study.learning_rates)
    sweeps = read_sweeps(study, base)
    for method, sweep in sweeps.items():
        console.print(f"{method}: {sweep}")
    runs = final_runs(study, base, sweeps)
    train(config for seed in study.seeds[1:] for config in runs[seed].values())
    check_converged(runs)
    run_scorings(plan_evaluations(study, runs, machine), console)
    results = read_evaluations(study, runs)
    findings = judge_extrapolation(perplexities_of(results), base.data.seq_length, sweeps)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write_extrapolation(output, study, base, sweeps=sweeps, results=results, findings=findings, device=device)
    for finding in findings:
        print(finding)
    print(f"results: {output}/{', '.join(EXTRAPOLATION_FILES)}")


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
