"""Where a run or a measurement comes from: command, commit, date, hardware and versions."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

import megalibi

_OUR_PACKAGES = ("megalibi", "alibi_attention", "fused_ops")
_SOURCES = ("*.py", "*.cpp", "*.h")


def describe_origin() -> dict[str, str]:
    """Return where what a process writes comes from: its command, the commit of megalibi, and the date.

    The commit ends in ``-dirty`` where tracked files differ from it, and is ``unknown`` where megalibi was installed
    from a wheel. The date is that of the call, in UTC.
    """
    return {
        "command": _describe_command(),
        "commit": _describe_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def describe_run(device: str, packages: Sequence[str] = ("torch",)) -> dict[str, Any]:
    """Return what a figure depends on besides the numbers that went in: command, commit, date, hardware, versions.

    Args:
        device: The device that computed, as torch names it; the name of a CUDA device is part of the hardware.
        packages: The packages whose versions matter; those that are not installed are left out.
    """
    versions = {"megalibi": megalibi.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**describe_origin(), "hardware": _describe_hardware(device), "versions": versions}


@cache
def hash_code() -> str:
    """Return the SHA-256 of the sources of our packages, as they were at the first call, in hexadecimal.

    It tells apart what a version or a commit does not: other checkouts, and files that differ from their commit.
    """
    digest = hashlib.sha256()
    for name, path in sorted(_find_sources().items()):
        digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _find_sources() -> dict[str, Path]:
    """Return the source files of our packages by the name that they have on every host, such as megalibi/log.py."""
    folders = [Path(str(find_spec(package).origin)).parent for package in _OUR_PACKAGES]  # type: ignore[union-attr]
    found = [(folder, path) for folder in folders for pattern in _SOURCES for path in folder.rglob(pattern)]
    return {path.relative_to(folder.parent).as_posix(): path for folder, path in found}


def _describe_command() -> str:
    """Return the command line of this process, as one would type it."""
    program, *arguments = sys.argv
    if Path(program).name == "__main__.py":  # Python puts the path of the module in the place of its name
        return shlex.join(["python", "-m", Path(program).parent.name, *arguments])
    if Path(program).suffix == ".py":
        return shlex.join(["python", program, *arguments])
    return shlex.join([Path(program).name, *arguments])  # a command that pip installed


def _describe_commit() -> str:
    package = Path(megalibi.__file__)
    # A virtual environment may stand inside of another project's repository, whose commit says nothing of megalibi.
    if _ask_git("ls-files", package.name, folder=package.parent):
        return _ask_git("describe", "--always", "--dirty", "--abbrev=12", folder=package.parent) or "unknown"
    return "unknown"


def _ask_git(*arguments: str, folder: Path) -> str:
    """Return what git answers; empty if there is no repository, or no git."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


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
