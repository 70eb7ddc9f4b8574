"""Small C libraries for LD_PRELOAD: what a process sees of its disk is then what a test wants it to see."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def build_library(library: Path, source: str) -> None:
    """Compile C source to a shared library."""
    compiler = next(found for found in map(shutil.which, ("cc", "gcc", "clang")) if found)
    command = [compiler, "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", str(library), "-ldl"]
    subprocess.run(command, input=source, text=True, check=True, timeout=120)
