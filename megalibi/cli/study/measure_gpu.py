"""Find out what a machine with one GPU gives, in minutes: ceilings, exactness, tests, a 1.3B model's steps, attention.

Each step is a process with a time limit: a step that fails or hangs does not stop the next. Results are written after
every step under results/gpu_NAME: summary.json, a JSON file of each step, logs, and report.md, a page that says what
failed and what bounds each part of a training step. The same command resumes: finished steps are not done again. On a
CPU a toy model is measured, to try out the command itself.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalibi.cli.command import Command, add_overrides
from megalibi.cli.study.root import get_repository
from megalibi.data.tokens.random_tokens import write_random_tokens
from megalibi.errors import ConfigError
from megalibi.files import lock_file, make_folder, write_aside
from megalibi.runtime.outputs import check_folder
from megalibi.studies.gpu_visit.machine import (
    check_same_machine,
    describe_visit,
    find_gpu,
    make_environment,
    name_folder,
    show_command,
)
from megalibi.studies.gpu_visit.report import format_visit
from megalibi.studies.gpu_visit.results import read_visit_results
from megalibi.studies.gpu_visit.setup import RANDOM_TOKENS, TOY_VOCAB_SIZE, VOCAB_SIZE, Setup, find_vocab_size
from megalibi.studies.gpu_visit.step import FAILED, SUMMARY_FILE, StepOutcome, VisitStep, expect_seconds, read_outcomes
from megalibi.studies.gpu_visit.steps import plan_steps
from megalibi.studies.gpu_visit.visit import Visit, run_visit

REPORT = "report.md"
FAILED_STEPS = "failed"
EXAMPLES = """examples:
  {command}                          (nine minutes, the dearest findings first)
  {command} --list
  {command} --only machine,ceilings,train_alibi train.micro_batch_size=2
  {command} --seconds 7200 --data data/books-train --valid data/books-valid --again failed
  {command} --device cpu --seconds 120 --output /tmp/visit
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--seconds", type=float, default=540.0, metavar="S", help="time of all steps together (default: %(default)g)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: results/gpu_NAME")
    parser.add_argument(
        "--scratch", type=Path, metavar="FOLDER", help="folder for training runs (default: runs/gpu_NAME_scratch)"
    )
    parser.add_argument("--data", metavar="PREFIX", help="token file to train on (default: random ids)")
    parser.add_argument("--valid", metavar="PREFIX", help="token file to evaluate the extrapolation study on")
    parser.add_argument("--only", metavar="NAME,NAME", help="do only these steps")
    parser.add_argument(
        "--again", metavar="NAME,NAME", help=f"do these steps again; {FAILED_STEPS} stands for all that failed"
    )
    parser.add_argument("--list", action="store_true", help="only show the steps and what is known of them")
    add_overrides(parser, "values that win over the 1.3B model's file, for example to fit a smaller GPU")


def _relative_root() -> Path:
    """Return the root so that commands which name it stay short."""
    return Path(os.path.relpath(get_repository("megalibi study measure-gpu")))


def find_peers(device: str) -> tuple[list[str], list[str]]:
    """Return the peers of attention that run here with memory linear in the length; those that torch compiles apart."""
    import torch

    from alibi_attention.bench.peers import PEERS

    usable = [p.name for p in PEERS if p.find_refusal(device, torch.bfloat16) is None and not p.bytes_per_score]
    return [name for name in usable if "flex" not in name], [name for name in usable if "flex" in name]


def choose(names: str, known: Sequence[str], option: str) -> list[str]:
    """Return names that a user gave, separated by commas.

    Raises:
        ConfigError: A name is not known.
    """
    chosen = names.split(",")
    for name in chosen:
        if name not in known:
            raise ConfigError(f"{option}={names}: must be names of {', '.join(known)}, and {name!r} is none of them")
    return chosen


def show_plan(steps: Sequence[VisitStep], records: dict[str, StepOutcome]) -> None:
    """Print the steps with the seconds they may take, and what is known of them."""
    for step in steps:
        record = records.get(step.name)
        known = record.status if record else f"not here: {step.impossible}" if step.impossible else ""
        expected = f"about {step.expected:5.0f} s," if step.expected else ""
        limits = f"at most {step.limit:5.0f} s, from {step.least:3.0f} s left on"
        print(f"{step.name:20} {expected:14} {limits}: {step.what:62} {known}")
    total = expect_seconds(steps)
    if total:
        print(f"in all about {total:.0f} s, an estimate")


def make_setup(arguments: argparse.Namespace, device: str, output: Path) -> Setup:
    """Return what the steps are made of."""
    scratch = arguments.scratch or _relative_root() / "runs" / f"{output.name}_scratch"
    peers, compiled = find_peers(device)
    given = [prefix for prefix in (arguments.data, arguments.valid) if prefix]
    return Setup(
        device=device,
        seconds=arguments.seconds,
        folder=output,
        scratch=scratch,
        root=_relative_root(),
        python=sys.executable,
        data=arguments.data or str(scratch / "random_tokens"),
        vocab_size=find_vocab_size(given) if given else VOCAB_SIZE,
        valid=arguments.valid if arguments.data and arguments.valid else "",
        peers=peers,
        compiled_peers=compiled,
        overrides=arguments.overrides,
    )


def visit(arguments: argparse.Namespace, setup: Setup, steps: Sequence[VisitStep], gpu: dict[str, Any]) -> int:
    """Do the steps, with the report written after each; return the exit code."""
    text = arguments.data or f"random ids of a vocabulary of {TOY_VOCAB_SIZE if setup.is_toy else VOCAB_SIZE}"
    facts, names = describe_visit(setup.device, gpu, text), [step.name for step in steps]
    check_same_machine(setup.folder, facts)
    known = read_outcomes(setup.folder)
    again = choose(arguments.again, [*names, FAILED_STEPS], "--again") if arguments.again else []
    if FAILED_STEPS in again:
        again += [name for name, record in known.items() if record.status == FAILED]
    for folder in (setup.folder, setup.scratch):
        make_folder(folder)

    def write_page(records: Sequence[StepOutcome]) -> None:
        write_aside(setup.folder / REPORT, format_visit(read_visit_results(setup.folder, facts, records)))

    lock = setup.scratch / "visit.lock"
    with lock.open("w") as held:
        lock_file(held.fileno(), lock)
        if not arguments.data:
            write_random_tokens(Path(setup.data), TOY_VOCAB_SIZE if setup.is_toy else VOCAB_SIZE, RANDOM_TOKENS)
        records = run_visit(
            steps,
            Visit(
                folder=setup.folder,
                seconds=arguments.seconds,
                environment=make_environment(os.environ, setup.root, setup.device),
                facts=facts,
                say=lambda line: print(line, flush=True),
                changed=write_page,
                show_command=show_command,
            ),
            again=again,
        )
        write_page(records)
    print(f"report: {setup.folder / REPORT}")
    return 1 if any(record.status == FAILED for record in records) else 0


def run(arguments: argparse.Namespace) -> int:
    """Check everything, and show the plan or carry it out."""
    if not 0 < arguments.seconds < float("inf"):
        raise ConfigError(f"--seconds={arguments.seconds:g}: must be a number above 0")
    gpu = {} if arguments.device == "cpu" else find_gpu(os.environ)
    device = arguments.device or ("cuda" if gpu else "cpu")
    if device == "cuda" and not gpu:
        raise ConfigError(
            "--device=cuda: must be cpu here, for nvidia-smi finds no GPU; --device cpu tries the visit at toy size"
        )
    output = arguments.output or name_folder(_relative_root(), device, gpu)
    check_folder(output, "--output", files=(SUMMARY_FILE, REPORT))
    setup = make_setup(arguments, device, output)
    steps = plan_steps(setup)
    if arguments.only:
        chosen = choose(arguments.only, [step.name for step in steps], "--only")
        steps = [step for step in steps if step.name in chosen]
    if arguments.list:
        show_plan(steps, read_outcomes(output))
        return 0
    return visit(arguments, setup, steps, gpu)


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
