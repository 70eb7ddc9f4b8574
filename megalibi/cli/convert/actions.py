"""Write a checkpoint anew: for another topology, or in the format of another program, or from one.

Every action reads IN and writes OUT, a new folder or file that appears when it is complete, with a certificate.json of
what came out. ACTION --help shows the options and examples of one.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from megalibi.cli.command import Command
from megalibi.cli.convert import from_hf, reshard, to_fp32, to_gguf, to_hf, verify

ACTIONS: Mapping[str, tuple[Command, str]] = {
    "reshard": (reshard.COMMAND, "the same checkpoint for another topology"),
    "to-fp32": (to_fp32.COMMAND, "the weights alone, whole and in fp32, as safetensors"),
    "to-hf": (to_hf.COMMAND, "a folder for transformers: MPT, Bloom or Falcon"),
    "from-hf": (from_hf.COMMAND, "a checkpoint of a folder of Hugging Face: MPT, Bloom or Falcon"),
    "to-gguf": (to_gguf.COMMAND, "a file for llama.cpp"),
    "verify": (verify.COMMAND, "whether a checkpoint is whole and sound, as megalibi checkpoint verify"),
}
"""Every action, with what it does in a few words. A new one is a module with a ``COMMAND``, and a line here."""

EXAMPLES = """examples:
  {command} reshard runs/big step_on_4 --tensor-parallel-size 4
  {command} to-fp32 runs/big big_fp32
  {command} to-hf runs/big big_mpt --format mpt
  {command} from-hf big_mpt big_again
  {command} verify runs/big
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a parser for each action."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, (command, summary) in ACTIONS.items():
        typed = f"{parser.prog} {name}"
        action = actions.add_parser(
            name,
            prog=typed,
            help=summary,
            description=command.description,
            epilog=command.examples.format(command=typed),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(action)
        action.set_defaults(run_action=command.run)


def run(arguments: argparse.Namespace) -> int | None:
    """Do what the user chose."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is trained here, and DeepSpeed warns of no GPU
    code: int | None = arguments.run_action(arguments)
    return code


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run, has_actions=True)
