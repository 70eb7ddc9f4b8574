"""A tool run in the test's own process, which has its imports: what it starts are processes as ever."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from megalibi.runtime.exit import run_tool

Runner = Callable[..., tuple[int, str, str]]
"""Takes arguments; returns exit code, output and errors."""


def load_tool(path: Path) -> ModuleType:
    """Import a script."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def make_runner(
    tool: ModuleType, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runner:
    """Return what runs the tool's main with arguments, on one thread a process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run_here(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        with pytest.raises(SystemExit) as end:
            run_tool(tool.main)
        return (end.value.code or 0, *capsys.readouterr())  # type: ignore[return-value]

    return run_here
