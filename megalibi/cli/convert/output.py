"""What the actions share: IN and OUT on the command line, and how an action shows how far it is."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megalibi.console import Progress
from megalibi.errors import ConfigError, FileError, describe_os_error
from megalibi.runtime.outputs import check_folder

if TYPE_CHECKING:
    from megalibi.export.certificate import Certificate

CHECKPOINT_HELP = "a step's folder, or a run's, whose latest checkpoint is taken"
Show = Callable[[str, int, int], None]
"""Told of each tensor by name, with the number of those done and of all."""
_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


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


def add_shard_size(parser: argparse.ArgumentParser) -> None:
    """Add ``--max-shard-size``.

    Args:
        parser: Gets it as ``max_shard_size``, in bytes.
    """
    parser.add_argument(
        "--max-shard-size", type=_parse_size, default="5GB", metavar="SIZE", help="most bytes of a file (%(default)s)"
    )


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Add ``--no-compare``.

    Args:
        parser: Gets it as ``no_compare``.
    """
    parser.add_argument(
        "--no-compare",
        action="store_true",
        help="run neither model: for those for which memory does not suffice, 8 bytes a parameter and the logits",
    )


def describe_certificate(certificate: Certificate) -> str:
    """Return what a certificate says, in a few words."""
    rounding = max((tensor.largest_difference or 0.0 for tensor in certificate.tensors), default=0.0)
    equal = f"rounded by up to {rounding:.1e}" if rounding else "bit-equal"
    said = f"{len(certificate.tensors):,} tensors {equal}"
    if (comparison := certificate.comparison) is None:
        return f"{said}; logits not compared: {certificate.not_compared}"
    return (
        f"{said}; at {comparison.tokens:,} tokens the logits are within {comparison.largest_logit_difference:.1e}, "
        f"probabilities within {comparison.largest_probability_difference:.1e}, "
        f"perplexity {comparison.source_perplexity:.6g} before and {comparison.target_perplexity:.6g} after"
    )


def _parse_size(text: str) -> int:
    """Return a number of bytes, such as 5GB or 200MB."""
    number, unit = text[:-2], text[-2:].upper()
    if unit not in _SIZES or not number.isdigit() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number with KB, MB or GB, such as 5GB")
    return int(number) * _SIZES[unit]


def check_new(output: Path) -> None:
    """Check before the work that a folder or a file can come to exist. Nothing is made.

    Raises:
        ConfigError: It exists.
        FileError: It cannot be made.
    """
    if output.name in ("", ".."):
        raise ConfigError(f"OUT={output}: must end in the name of what is to be made")
    if os.path.lexists(output):
        raise ConfigError(f"OUT={output}: must not exist; give another name, or move that one")
    check_folder(output, "OUT")


def check_new_checkpoint(output: Path) -> None:
    """Check besides that a new checkpoint does not come between those of a run, whose latest it would be.

    Raises:
        ConfigError: It exists, or stands among the checkpoints of a run.
        FileError: It cannot be made.
    """
    check_new(output)
    from megalibi.checkpoint import CHECKPOINTS  # which imports DeepSpeed

    if output.absolute().parent.name == CHECKPOINTS:
        raise ConfigError(f"OUT={output}: must not stand in the checkpoints of a run: give another folder")


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
