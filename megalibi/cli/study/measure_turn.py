"""Time a few steps of a run and measure their memory, in processes of their own; no checkpoint is written.

The comparison starts it for each of its turns. It runs alone, or on ranks of deepspeed, torchrun or srun.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megalibi.cli.command import RankCommand, add_run
from megalibi.config import load_config
from megalibi.runtime.environment import set_environment
from megalibi.runtime.ranks import Place
from megalibi.train.start import start_job

EXAMPLES = """example:
  {command} --config configs/books_24m_alibi.yaml --output turn.json train.steps=4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_run(parser, "YAML file of the run; its train.steps are timed")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .json to write")


def run(arguments: argparse.Namespace, place: Place) -> None:
    """Check everything, set up the device and torch.distributed, and measure."""
    config = load_config(arguments.config, arguments.overrides)
    set_environment(config)
    from megalibi.runtime.outputs import check_outputs

    check_outputs({"--output": arguments.output})
    job = start_job(config, place)

    from megalibi.measure.turn import measure_turn  # not before the device is set up

    measure_turn(job, arguments.output)


COMMAND = RankCommand(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
