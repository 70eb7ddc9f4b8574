"""The machine of a visit: its GPU, where its results go, the environment of the steps, and how a step is typed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalibi.errors import ConfigError
from megalibi.metrics.provenance import describe_run
from megalibi.studies.gpu_visit.step import SUMMARY_FILE, read_outcomes
from megalibi.studies.machinery.machine import COMMAND_SCRIPT


def find_gpu(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return name and driver of the first GPU; empty: there is none.

    Not from torch, which would take memory of the GPU for as long as this process lives.

    Args:
        environment: The environment of this process; CUDA_VISIBLE_DEVICES says which GPU is the first.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
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


def describe_visit(device: str, gpu: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Return what summary.json begins with.

    Args:
        device: The device: cuda, or cpu for a trial.
        gpu: The first GPU, from find_gpu.
        text: What the models are trained on, in a few words.
    """
    facts = describe_run("cpu", ("torch", "triton", "deepspeed", "flash-attn"))
    facts["hardware"] = {**facts["hardware"], **gpu}
    return {**facts, "device": device, "text": text}


def name_folder(root: Path, device: str, gpu: Mapping[str, Any]) -> Path:
    """Return where results go unless the user says it: results/gpu_h200, or for a trial runs/gpu_cpu.

    Args:
        root: The repository.
        device: The device: cuda, or cpu for a trial.
        gpu: The first GPU, from find_gpu.
    """
    if device == "cpu":
        return root / "runs" / "gpu_cpu"
    words = re.split(r"[^a-z0-9]+", gpu["gpu"].lower())
    named = [word for word in words if word not in ("nvidia", "tesla", "")]
    return root / "results" / "_".join(["gpu", *named])


def make_environment(environment: Mapping[str, str], root: Path, device: str) -> dict[str, str]:
    """Return the environment of the steps, in which our packages are found and only one device is seen.

    Args:
        environment: The environment of this process.
        root: The repository.
        device: The device: cuda, or cpu for a trial.
    """
    paths = [str(root.resolve()), str(root.resolve() / "kernels"), environment.get("PYTHONPATH", "")]
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        return {**environment, **ours, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    kept = {name: value for name, value in environment.items() if name not in ("TRITON_INTERPRET", "DS_ACCELERATOR")}
    card = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {**kept, **ours, "CUDA_VISIBLE_DEVICES": card}


def check_same_machine(folder: Path, facts: Mapping[str, Any]) -> None:
    """Refuse a folder that holds results of another machine.

    Args:
        folder: The folder for results, --output.
        facts: What summary.json is to begin with.

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
