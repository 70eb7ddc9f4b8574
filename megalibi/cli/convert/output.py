"""What the actions share: IN and OUT on the command line, and how an action shows how far it is."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megalibi.console import Progress
from megalibi.errors import ConfigError, FileError, describe_os_error
from megalibi.runtime.outputs import check_folder

CHECKPOINT_HELP = "a step's folder, or a run's, whose latest checkpoint is taken"
Show = Callable[[str, int, int], None]
"""Told of each tensor by name, with the number of those done and of all."""


def add_paths(parser: argparse.ArgumentParser, *, input_help: str, output_help: str) -> None:
    """Add IN, OUT and ``--dry-run``.

    Args:
        parser: Gets them as ``input``, ``output`` and ``dry_run``.
        input_help: What ``--help`` says of IN.
        output_help: What ``--help`` says of OUT.
    """
    parser.add_argument("input", type=Path, metavar="IN", help=input_help)
    parser.add_argument("output", type=Path, metavar="OUT", help=f"{output_help}, which must not exist")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")


def check_new(output: Path) -> None:
    """Check before the work that a folder can come to exist.

    Raises:
        ConfigError: It exists, or cannot be made.
    """
    if os.path.lexists(output):
        raise ConfigError(f"OUT={output}: must not exist; give another folder, or move that one")
    check_folder(output, "OUT")


@contextmanager
def showing_tensors(task: str, output: Path) -> Iterator[Show]:
    """Give what shows the progress of an action; what the disk refuses meanwhile becomes one line.

    Args:
        task: The name of the action.
        output: What is written.

    Raises:
        FileError: The disk is full or fails.
    """
    with Progress() as progress:
        try:
            yield lambda name, done, total: progress.show(task, name, done=done, total=total)
        except OSError as error:
            raise FileError(describe_os_error(error, output)) from error
