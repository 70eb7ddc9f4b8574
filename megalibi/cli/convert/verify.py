"""Verify that a checkpoint is whole and sound: the same as ``megalibi checkpoint verify IN``.

Every file is read and its checksum compared with the manifest's; then the numbers are looked at, which must be finite,
and the same on all tensor ranks that hold the same. What is wrong is named, with exit code 2.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megalibi.cli import checkpoint as checkpoint_command
from megalibi.cli.command import Command
from megalibi.cli.convert.output import CHECKPOINT_HELP

EXAMPLES = """examples:
  {command} runs/big
  {command} runs/big/checkpoints/step_00000100
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint."""
    parser.add_argument("input", type=Path, metavar="IN", help=CHECKPOINT_HELP)


def run(arguments: argparse.Namespace) -> None:
    """Open the checkpoint, and read all of it."""
    from megalibi.checkpoint import Checkpoint

    checkpoint_command.verify(Checkpoint.open(arguments.input))


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
