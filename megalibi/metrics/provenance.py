"""What a measurement is kept with in its JSON file: command, commit, versions, hardware and date."""

from __future__ import annotations

import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

import megalibi
from megalibi.errors import ConfigError
from megalibi.files import write_aside


def describe_run(device: str, packages: Sequence[str] = ("torch",)) -> dict[str, Any]:
    """Return what a figure depends on besides the numbers that went in: command, commit, date, hardware, versions.

    Args:
        device: What computed; of a CUDA device its name is told.
        packages: Whose versions matter; those that are not installed are left out.
    """
    versions = {"megalibi": megalibi.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": _describe_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": _describe_hardware(device),
        "versions": versions,
    }


def write_json(fields: Mapping[str, Any], output: Path) -> None:
    """Write a JSON file aside and rename it: an interruption leaves the old file or the new one, never a part.

    A list of numbers stands on one line.

    Raises:
        ConfigError: It cannot be written.
    """
    text = re.sub(r"\[\n[-+.\deE,\s]+\]", lambda numbers: " ".join(numbers[0].split()), json.dumps(fields, indent=1))
    try:
        write_aside(output, text + "\n")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}") from error


def _describe_commit() -> str:
    folder = str(Path(megalibi.__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def _describe_hardware(device: str) -> dict[str, Any]:
    import torch  # here, so that reading a report does not wait for torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    hardware = {"cpu": names[0] if names else platform.machine(), "cores": psutil.cpu_count()}
    hardware |= {"threads": torch.get_num_threads(), "memory_bytes": psutil.virtual_memory().total}
    if device.startswith("cuda"):
        hardware["gpu"] = torch.cuda.get_device_name(device)
    return hardware
