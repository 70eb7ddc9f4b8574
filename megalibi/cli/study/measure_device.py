"""Make one small measurement of a device: its description, its ceilings, planned memory, or exact resume.

``megalibi study measure-gpu`` starts it for some of its steps.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megalibi.cli.command import Command, add_overrides
from megalibi.errors import ConfigError
from megalibi.files import write_json
from megalibi.metrics.provenance import describe_run
from megalibi.runtime.outputs import check_outputs

EXAMPLES = """examples:
  {command} ceilings --device cuda --output ceilings.json
  {command} plan --device cuda --turn train_alibi.json --output plan.json
"""
PACKAGES = ("torch", "triton", "deepspeed", "flash-attn", "transformers", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("name", choices=list(_MEASUREMENTS))
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .json to write")
    parser.add_argument(
        "--turn",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="plan: an output of megalibi study measure-turn",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="resume: the run's YAML")
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="resume: folder for its runs")
    add_overrides(parser, "resume: values that win over it")


def measure_machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what nvidia-smi and torch report about the device."""
    import torch

    if arguments.device == "cpu":
        return {"torch": torch.__config__.show().splitlines()}
    properties = torch.cuda.get_device_properties(0)
    fields = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "power.limit", "memory.total", "ecc.mode.current")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    except OSError as error:
        said = [f"no nvidia-smi: {error.strerror}"]
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": [properties.major, properties.minor],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": list(torch.cuda.nccl.version()),
        "nvidia_smi": said,
    }


def measure_the_ceilings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the highest rates of matrix products and copies that the device reaches."""
    import torch

    from megalibi.measure.ceilings import measure_ceilings

    return {"ceilings": measure_ceilings(torch.device(arguments.device))}


def measure_plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the planned memory of training steps beside the measured."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # nothing is computed here, and another step uses the GPU
    from megalibi.measure.check_plan import compare_with_plan

    return {"turns": compare_with_plan(arguments.turn, arguments.device)}


def measure_resume(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return whether a training that was stopped and resumed equals one that was not."""
    from megalibi.measure.check_resume import check_resume
    from megalibi.studies.machinery.machine import COMMAND_SCRIPT

    for name in ("config", "scratch"):
        if getattr(arguments, name) is None:
            raise ConfigError(f"--{name} is missing: the measurement resume needs it")
    return check_resume(
        [sys.executable, COMMAND_SCRIPT, "pretrain"], arguments.config, arguments.overrides, arguments.scratch
    )


_MEASUREMENTS = {
    "machine": measure_machine,
    "ceilings": measure_the_ceilings,
    "plan": measure_plan,
    "resume": measure_resume,
}


def run(arguments: argparse.Namespace) -> None:
    """Measure one thing, and write it with what it depends on."""
    check_outputs({"--output": arguments.output})
    found = _MEASUREMENTS[arguments.name](arguments)
    described = "cpu" if arguments.name in ("plan", "resume") else arguments.device
    write_json({**found, **describe_run(described, PACKAGES)}, arguments.output)
    print(f"{arguments.name}: {arguments.output}")


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
