"""Find out what a machine with one GPU gives, in minutes: ceilings, exactness, tests, a 1.3B model's steps, attention.

Each step is a process with a time limit: a step that fails or hangs does not stop the next. Results are written after
every step under results/gpu_NAME: summary.json, a JSON file of each step, logs, and report.md, a page that says what
failed and what bounds each part of a training step. The same command resumes: finished steps are not done again. On a
CPU a toy model is measured, to try out the command itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalibi.cli.command import Command, add_overrides
from megalibi.cli.study.root import find_root
from megalibi.data.provenance import read_provenance
from megalibi.data.tokens.token_file import TokenFile
from megalibi.errors import ConfigError
from megalibi.files import lock_file, make_folder, write_aside
from megalibi.metrics.provenance import describe_run
from megalibi.runtime.outputs import check_folder
from megalibi.studies.gpu_visit.random_tokens import write_random_tokens
from megalibi.studies.gpu_visit.report import format_report
from megalibi.studies.gpu_visit.results import read_results
from megalibi.studies.gpu_visit.setup import TOY_VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE_1_3B, Setup
from megalibi.studies.gpu_visit.step import FAILED, SUMMARY_FILE, StepOutcome, VisitStep, expect_seconds, read_outcomes
from megalibi.studies.gpu_visit.steps import plan_steps
from megalibi.studies.gpu_visit.visit import Visit, run_visit
from megalibi.studies.machinery.machine import COMMAND_SCRIPT

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


def find_gpu() -> dict[str, Any]:
    """Return name and driver of the first GPU; empty: there is none.

    Not from torch, which would take memory of the GPU for as long as this process lives.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return {}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    query += [] if visible is None else ["-i", visible.split(",")[0]]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=False)
    except OSError:
        return {}
    name, _, driver = said.stdout.partition("\n")[0].partition(",")
    return {"gpu": name.strip(), "driver": driver.strip()} if said.returncode == 0 and driver else {}


def describe(device: str, gpu: dict[str, Any], text: str) -> dict[str, Any]:
    """Return what summary.json begins with."""
    facts = describe_run("cpu", ("torch", "triton", "deepspeed", "flash-attn"))
    facts["hardware"] = {**facts["hardware"], **gpu}
    return {**facts, "device": device, "text": text}


def _relative_root() -> Path:
    """Return the root so that commands which name it stay short."""
    return Path(os.path.relpath(find_root()))


def name_folder(device: str, gpu: dict[str, Any]) -> Path:
    """Return where results go unless the user says it: results/gpu_h200, or for a trial runs/gpu_cpu."""
    if device == "cpu":
        return _relative_root() / "runs" / "gpu_cpu"
    words = re.split(r"[^a-z0-9]+", gpu["gpu"].lower())
    named = [word for word in words if word not in ("nvidia", "tesla", "")]
    return _relative_root() / "results" / "_".join(["gpu", *named])


def make_environment(device: str) -> dict[str, str]:
    """Return the environment of the steps, in which our packages are found and only one device is seen."""
    root = find_root().resolve()
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        return {**os.environ, **ours, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "DS_ACCELERATOR")}
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {**kept, **ours, "CUDA_VISIBLE_DEVICES": card}


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


def check_same_machine(folder: Path, facts: dict[str, Any]) -> None:
    """Refuse a folder that holds results of another machine.

    Raises:
        ConfigError: They are results of another device.
    """
    path = folder / SUMMARY_FILE
    if not path.exists():
        return
    read_outcomes(folder)  # it refuses a file that is no summary
    theirs = json.loads(path.read_text(encoding="utf-8"))
    for what, ours, other in (
        ("device", facts["device"], theirs.get("device")),
        ("hardware.gpu", facts["hardware"].get("gpu"), theirs.get("hardware", {}).get("gpu")),
    ):
        if ours != other:
            raise ConfigError(
                f"--output={folder}: must hold results of {what}={ours}, and holds some of {other}; give another folder"
            )


def show_command(command: Sequence[str]) -> str:
    """Return a command as a user would type it."""
    words = ["megalibi", *command[2:]] if command[1] == COMMAND_SCRIPT else command
    return shlex.join(["python" if word == sys.executable else word for word in words])


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


def find_vocab_size(prefixes: Sequence[str]) -> int:
    """Return the vocabulary's size of token files, the 1.3B model's if they do not say it.

    Raises:
        ConfigError: One is missing or damaged.
    """
    known = [read_provenance(TokenFile(prefix)) for prefix in prefixes]
    return max((said.tokenizer["vocab_size"] for said in known if said is not None), default=VOCAB_SIZE_1_3B)


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
    facts, names = describe(setup.device, gpu, text), [step.name for step in steps]
    check_same_machine(setup.folder, facts)
    known = read_outcomes(setup.folder)
    again = choose(arguments.again, [*names, FAILED_STEPS], "--again") if arguments.again else []
    if FAILED_STEPS in again:
        again += [name for name, record in known.items() if record.status == FAILED]
    for folder in (setup.folder, setup.scratch):
        make_folder(folder)

    def write_page(records: Sequence[StepOutcome]) -> None:
        write_aside(setup.folder / REPORT, format_report(read_results(setup.folder, facts, records)))

    lock = setup.scratch / "visit.lock"
    with lock.open("w") as held:
        lock_file(held.fileno(), lock)
        if not arguments.data:
            write_random_tokens(Path(setup.data), TOY_VOCAB_SIZE if setup.is_toy else VOCAB_SIZE)
        records = run_visit(
            steps,
            Visit(
                folder=setup.folder,
                seconds=arguments.seconds,
                environment=make_environment(setup.device),
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
    gpu = {} if arguments.device == "cpu" else find_gpu()
    device = arguments.device or ("cuda" if gpu else "cpu")
    if device == "cuda" and not gpu:
        raise ConfigError("--device=cuda: nvidia-smi finds no GPU; --device cpu tries the visit at toy size")
    output = arguments.output or name_folder(device, gpu)
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
