"""What every command of the command line is made of, and how it is started. Nothing here imports torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from megalibi import log
from megalibi.runtime.exit import run_rank, run_tool
from megalibi.runtime.ranks import Place

OVERRIDES_HELP = "values that win over the file"


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How a user types a command, which is how its usage line and its examples show it."""

    command: str
    """What starts it as one process: ``megalibi evaluate``, or ``python tools/evaluate.py``."""
    torchrun: str
    """What stands after torchrun and its options: ``-m megalibi evaluate``, or ``tools/evaluate.py``."""
    deepspeed: str
    """What stands after deepspeed and its options: ``--module megalibi evaluate``, or ``tools/evaluate.py``."""


def spell_command(name: str) -> Spelling:
    """Return how a command of ``megalibi`` is typed.

    Args:
        name: The words after ``megalibi``, such as ``study extrapolate``.
    """
    typed = f"megalibi {name}"
    return Spelling(command=typed, torchrun=f"-m {typed}", deepspeed=f"--module {typed}")


def spell_script(path: str) -> Spelling:
    """Return how a script that starts a command is typed.

    Args:
        path: The script, as the user gave it to Python.
    """
    return Spelling(command=f"python {path}", torchrun=path, deepspeed=path)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command that runs as one process; ``run_tool`` gives its exit codes."""

    description: str
    """What the command does; the module's docstring."""
    examples: str
    """Lines to type; {command}, {torchrun} and {deepspeed} stand for the fields of ``Spelling``."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    """Adds the command's options and positional arguments to a parser."""
    run: Callable[[argparse.Namespace], int | None]
    """Does the work, and returns the exit code; None stands for 0."""
    has_actions: bool = False
    """Whether its options are those of actions, each with a parser of its own."""

    def parse(self, words: Sequence[str], spelling: Spelling) -> argparse.Namespace:
        """Return the values of the options; positional arguments may stand on both sides of an option.

        Args:
            words: The command line after the command's name.
            spelling: How the user typed the command.

        Raises:
            SystemExit: With exit code 2 after a usage error, with 0 after ``--help``.
        """
        parser = _make_parser(self.description, self.examples, self.add_arguments, spelling)
        return parser.parse_args(words) if self.has_actions else parser.parse_intermixed_args(words)

    def start(self, words: Sequence[str], spelling: Spelling) -> NoReturn:
        """Run the command, and end the process with its exit code.

        Args:
            words: The command line after the command's name.
            spelling: How the user typed the command.
        """
        log.configure()
        run_tool(lambda: self.run(self.parse(words, spelling)))


@dataclass(frozen=True, kw_only=True)
class RankCommand:
    """A command that deepspeed, torchrun or srun may start on several ranks; ``run_rank`` gives its exit codes."""

    description: str
    """What the command does; the module's docstring."""
    examples: str
    """Lines to type; {command}, {torchrun} and {deepspeed} stand for the fields of ``Spelling``."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    """Adds the command's options and positional arguments to a parser."""
    run: Callable[[argparse.Namespace, Place], int | None]
    """Does one rank's part of the work, and returns the rank's exit code; None stands for 0."""

    def parse(self, words: Sequence[str], spelling: Spelling) -> argparse.Namespace:
        """Return the values of the options; see ``Command.parse``."""
        return _make_parser(self.description, self.examples, self._add_all, spelling).parse_intermixed_args(words)

    def start(self, words: Sequence[str], spelling: Spelling) -> NoReturn:
        """Do this rank's part of the command, and end the process with its exit code; see ``Command.start``."""
        arguments = self.parse(words, spelling)
        run_rank(lambda place: self.run(arguments, place))

    def _add_all(self, parser: argparse.ArgumentParser) -> None:
        self.add_arguments(parser)
        parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed adds it; LOCAL_RANK says it too


def add_overrides(parser: argparse.ArgumentParser, text: str = OVERRIDES_HELP) -> None:
    """Add the values that win over those of a configuration file.

    Args:
        parser: Gets them as ``overrides``, a list of ``section.field=value``.
        text: What ``--help`` says of them.
    """
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help=text)


def add_inputs(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the text that a command reads; the option may be given several times.

    Args:
        parser: Gets it as ``input``, a list of names.
        text: What ``--help`` says of it.
    """
    parser.add_argument("--input", nargs="+", action="extend", required=True, metavar="FILE", help=text)


def add_run(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the configuration of a run: its file, and the values that win over it.

    Args:
        parser: Gets them as ``config`` and ``overrides``.
        text: What ``--help`` says of the file.
    """
    parser.add_argument("--config", required=True, help=text)
    add_overrides(parser)


def _make_parser(
    description: str, examples: str, add_arguments: Callable[[argparse.ArgumentParser], None], spelling: Spelling
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=spelling.command,
        description=description,
        epilog=examples.format(command=spelling.command, torchrun=spelling.torchrun, deepspeed=spelling.deepspeed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return parser
