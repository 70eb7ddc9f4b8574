"""Compare ALiBi with sinusoidal positions at twice the length, and both at every length: the paper's 1.3B comparison.

Part one measures speed: every model takes steps with attention that holds its scores (unfused) and with fast attention,
in turns of fresh processes. Nothing else should run meanwhile: a speed whose turns disagree decides nothing, and the
command says which to measure again. Part two measures quality: the models are trained to equal updates, and their
checkpoints are evaluated. The results are report.md, figure5.png and results.json. After an interruption the same
command resumes (without --again, which begins anew); nothing is done twice.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from megalibi.cli.command import Command, add_overrides
from megalibi.cli.study.root import find_root, get_repository
from megalibi.config import Config
from megalibi.errors import ConfigError
from megalibi.runtime.outputs import check_folder
from megalibi.studies.comparison.study import COMPARISON_FILES, FIGURE_5, CompareStudy
from megalibi.studies.machinery.machine import detect_machine
from megalibi.studies.study import load_study

if TYPE_CHECKING:
    from megalibi.plan.memory_trace import MemoryByKind
    from megalibi.studies.comparison.results import Results
    from megalibi.studies.comparison.study import Variant

SCALES = ("smoke", "small", "1.3b", "1.3b_10min")
EXAMPLES = """examples:
  {command} --scale smoke
  {command} --scale small --jobs 2
  {command} --scale small --part speed --again 2
  {command} --scale 1.3b --plan
  {command} --scale 1.3b --part speed --data data/train --valid data/valid study.turns=5
scales:
  smoke       takes minutes on 2 CPU cores, on the text of `make quickstart`; its numbers mean nothing
  small       takes hours on a CPU, or minutes on a GPU
  1.3b        --part speed takes one GPU of 80 GB, or more ranks; --part quality is meant for a cluster
  1.3b_10min  is one turn of --part speed, with an eighth of its batch
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_overrides(parser, "values that win over those of the scale's file")
    parser.add_argument("--scale", choices=SCALES, required=True, help="configs/compare_SCALE.yaml")
    parser.add_argument("--data", metavar="PREFIX", help="token file to train on (data.train)")
    parser.add_argument("--valid", metavar="PREFIX", help="token file to evaluate on (data.valid)")
    parser.add_argument("--part", choices=["speed", "quality", "all"], default="all", help="default: %(default)s")
    parser.add_argument(
        "--again",
        type=_parse_numbers,
        default=(),
        metavar="N,N",
        help="turns of part one to measure again, with every model; their records are kept beside the new ones",
    )
    parser.add_argument(
        "--plan", action="store_true", help="run nothing; compute shapes, parameters and memory without a device"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="default: results/compare_SCALE, and with --plan results/compare_SCALE_plan",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="trainings and evaluations that run at once (default: %(default)s); turns run alone",
    )
    parser.add_argument(
        "--launcher", default="", metavar="COMMAND", help="what starts the ranks: 'srun python', for example"
    )


def _parse_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers of turns, such as 1,3, not {text}") from None


def load_comparison(arguments: argparse.Namespace) -> tuple[CompareStudy, Config]:
    """Return the study of --scale on the text of --data and --valid, and the run that it varies."""
    given = {"data.train": arguments.data, "data.valid": arguments.valid}
    overrides = [f"{field}={prefix}" for field, prefix in given.items() if prefix is not None]
    return load_study(
        get_repository("megalibi study compare-1p3b") / "configs" / f"compare_{arguments.scale}.yaml",
        [*overrides, *arguments.overrides],
        CompareStudy,
    )


def find_output(arguments: argparse.Namespace) -> Path:
    """Return where the results go: a plan has a folder of its own."""
    return arguments.output or find_root() / "results" / f"compare_{arguments.scale}{'_plan' if arguments.plan else ''}"


def check_devices(arguments: argparse.Namespace, plans: Mapping[Variant, MemoryByKind], gpus: int) -> None:
    """Refuse a scale that cannot run on this machine.

    Raises:
        ConfigError: The models need another GPU; the message says what to do instead.
    """
    from megalibi.plan.gpus import GIB
    from megalibi.studies.comparison.plan import check_fits

    if gpus:
        gpu = torch.cuda.get_device_properties(0)
        check_fits(plans, gpu.name, gpu.total_memory)
    elif arguments.scale.startswith("1.3b"):
        largest = max(memory.total for memory in plans.values())
        raise ConfigError(
            f"--scale={arguments.scale}: must have a GPU with room for {largest / GIB:.1f} GiB, and there is none; "
            "--plan computes shapes, parameters and memory without one, and --scale small runs on a CPU"
        )


def _say_load(console: Console) -> None:
    from megalibi.measure.other_work import read_load_average

    load = read_load_average()
    if load is not None:
        console.print(f"load average of the last minute: {load:.2f}; whatever runs beside the turns disturbs them")


def run(arguments: argparse.Namespace) -> None:
    """Check everything, measure, train, evaluate, write the results, and print the findings."""
    study, base = load_comparison(arguments)
    machine = detect_machine(os.environ, jobs=arguments.jobs, ranks=study.ranks, launcher=arguments.launcher)
    output = find_output(arguments)
    check_folder(output, "--output", files=COMPARISON_FILES)
    if arguments.again and (arguments.plan or arguments.part == "quality"):
        raise ConfigError("--again: measures turns of part one again, which --plan and --part quality leave out")
    if machine.gpus == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns of no GPU
    # After that: they import DeepSpeed.
    from megalibi.metrics.provenance import describe_origin, hash_code
    from megalibi.studies.comparison.measured_code import Code
    from megalibi.studies.comparison.plan import plan_variants, select_plans
    from megalibi.studies.comparison.quality import (
        check_quality,
        evaluate_models,
        plan_scorings,
        read_qualities,
        train_models,
    )
    from megalibi.studies.comparison.report.advice import advise, drop_options
    from megalibi.studies.comparison.report.findings import judge_comparison
    from megalibi.studies.comparison.report.write import describe_comparison, write_comparison
    from megalibi.studies.comparison.results import Results
    from megalibi.studies.comparison.speed import read_speeds
    from megalibi.studies.comparison.turns import plan_turns, run_turns

    console = Console(highlight=False, soft_wrap=True)
    check_quality(base)
    plans = plan_variants(base, study, device_type="cuda" if machine.gpus or arguments.plan else "cpu")
    turns = plan_turns(base, study, machine)
    if not arguments.plan:
        check_devices(arguments, select_plans(plans, base, arguments.part), machine.gpus)
    if arguments.part == "quality":
        read_speeds(turns, study)  # or turns that cannot be compared would be refused after hours of training

    gpu = torch.cuda.get_device_name() if machine.gpus else ""
    facts = describe_comparison(study, base, gpu=gpu, is_plan=arguments.plan, is_rehearsal=arguments.scale == "smoke")

    def write() -> Results:
        results = Results(
            study=study,
            updates=base.train.steps,
            plans=plans,
            speeds={} if arguments.plan else read_speeds(turns, study),
            qualities={} if arguments.plan else read_qualities(base, plan_scorings(base, study, machine)),
        )
        write_comparison(output, base, results, facts=facts, device="cuda" if machine.gpus else "cpu")
        return results

    if not arguments.plan and arguments.part != "quality":
        _say_load(console)
        code = Code.of({**describe_origin(), "code": hash_code()})
        resume = f"to go on: {drop_options(describe_origin()['command'], '--again')}"  # with it all begins anew
        run_turns(turns, console, code=code, again=arguments.again, resume=resume)
        write()  # part two takes longer
    if not arguments.plan and arguments.part != "speed":
        train_models(base, study, machine, console)
        evaluate_models(plan_scorings(base, study, machine), console)
    results = write()
    for finding in judge_comparison(results):
        print(finding)
    for line in advise(results.speeds, describe_origin()["command"]):
        print(line)
    print(f"results: {output}/results.json, report.md{f', {FIGURE_5}' if results.has_curves else ''}")


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
