"""``megalibi COMMAND``: finds the file of a command and starts it; no other command is imported, and no torch."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import megalibi
from megalibi.cli.command import Command, RankCommand, spell_command, spell_script
from megalibi.errors import ConfigError
from megalibi.runtime.exit import run_tool


@dataclass(frozen=True)
class Entry:
    """A command in the list that ``megalibi --help`` prints."""

    module: str
    """Where its ``COMMAND`` is, below ``megalibi.cli``."""
    summary: str
    """What it does, in a few words."""


COMMANDS: Mapping[str, Entry] = {
    "pretrain": Entry("pretrain", "pretrain a GPT; deepspeed, torchrun and srun start it on several ranks"),
    "tokenizer": Entry("tokenizer", "train a tokenizer on text"),
    "preprocess": Entry("preprocess", "turn text into a token file"),
    "evaluate": Entry("inference.evaluate", "loss and perplexity of a checkpoint at several lengths"),
    "generate": Entry("inference.generate", "text from a checkpoint, after prompts that are given or typed"),
    "lm-eval": Entry("inference.lm_evaluate", "tasks of lm-evaluation-harness on a checkpoint"),
    "plan": Entry("plan", "memory, arithmetic and communication of a run, without a GPU"),
    "report": Entry("report", "an HTML page about one or several runs"),
    "checkpoint": Entry("checkpoint", "what a checkpoint holds, and whether its files are whole"),
    "convert": Entry("convert.actions", "a checkpoint written anew: for another topology or program, or from one"),
    "warm-triton": Entry("warm_triton", "compile the Triton kernels of attention ahead"),
    "study extrapolate": Entry("study.extrapolate", "train short, test long: Figure 4 of the paper"),
    "study compare-1p3b": Entry("study.compare_1p3b", "ALiBi against sinusoidal positions at twice the length"),
    "study measure-gpu": Entry("study.measure_gpu", "what a machine with one GPU gives, in minutes"),
    "study measure-device": Entry("study.measure_device", "one small measurement of a device"),
    "study measure-turn": Entry("study.measure_turn", "time and memory of a few steps of a run"),
    "study profile-step": Entry("study.profile_step", "device time of one step, by kernel and by part"),
}
"""A new command is a file with a ``COMMAND``, and a line here."""


def load_command(name: str) -> Command | RankCommand:
    """Import a command.

    Args:
        name: One of ``COMMANDS``.
    """
    command = importlib.import_module(f"megalibi.cli.{COMMANDS[name].module}").COMMAND
    assert isinstance(command, (Command, RankCommand))
    return command


def main() -> NoReturn:
    """Start the command that the command line names, and end the process with its exit code."""
    start(sys.argv[1:])


def start(words: Sequence[str]) -> NoReturn:
    """Start the command that the first words name, and end the process with its exit code.

    Args:
        words: The command line after ``megalibi``.
    """
    # deepspeed --module puts its option for each rank before ours.
    launched = [word for word in words[:1] if word.startswith("--local_rank")]
    words = words[len(launched) :]
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in COMMANDS:
            load_command(name).start([*words[count:], *launched], spell_command(name))
    run_tool(lambda: _answer(words))


def start_script(name: str) -> NoReturn:
    """Start a command from a script that stands for it, such as tools/evaluate.py.

    Args:
        name: One of ``COMMANDS``.
    """
    load_command(name).start(sys.argv[1:], spell_script(sys.argv[0]))


def _answer(words: Sequence[str]) -> None:
    """Print the list of commands, or the version."""
    if words[:1] == ["--version"]:
        print(f"megalibi {megalibi.__version__}")
        return
    asked = [word for word in words if word not in ("-h", "--help")]
    group = {name: entry for name, entry in COMMANDS.items() if name.split()[: len(asked)] == asked}
    if not group:
        name = " ".join(asked[:2] if asked[0] == "study" else asked[:1])
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean megalibi {near[0]}?" if near else "megalibi --help lists them"
        raise ConfigError(f"COMMAND={name}: must be a command of megalibi; {hint}")
    print(_describe(group, ["megalibi", *asked]))
    if len(asked) == len(words):  # nobody asked for help
        raise ConfigError(f"{' '.join(['megalibi', *asked])}: COMMAND is missing; give one of these")


def _describe(group: Mapping[str, Entry], typed: Sequence[str]) -> str:
    """Return the list of the commands that begin with the words after ``megalibi``."""
    begin = " ".join(typed)
    rows = {f"megalibi {name}".removeprefix(begin).strip(): entry.summary for name, entry in group.items()}
    width = max(map(len, rows))
    lines = [f"  {name:{width}}  {summary}" for name, summary in rows.items()]
    about = "Distributed pretraining of GPTs with ALiBi attention under DeepSpeed."
    end = f"{begin} COMMAND --help shows the options and examples of one."
    return "\n".join([f"usage: {begin} COMMAND ...", "", about, "", "commands:", *lines, "", end])
