"""A command run in the test's own process, which has its imports: what it starts are processes as ever."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from megalibi.cli.command import Command, spell_script
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
    command: Command, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runner:
    """Return what runs a command with arguments as the script at ``path`` does, on one thread a process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run_here(*arguments: object) -> tuple[int, str, str]:
        words = list(map(str, arguments))
        monkeypatch.setattr(sys, "argv", [str(path), *words])
        with pytest.raises(SystemExit) as end:
            run_tool(lambda: command.run(command.parse(words, spell_script(str(path)))))
        return (end.value.code or 0, *capsys.readouterr())  # type: ignore[return-value]

    return run_here
