"""Profile a step of a run on one GPU, or on the CPU: device time by kernel and by part of the step."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalibi.cli.command import RankCommand, add_run
from megalibi.config import load_config
from megalibi.errors import ConfigError
from megalibi.runtime.environment import set_environment
from megalibi.runtime.ranks import Place
from megalibi.train.start import start_job

EXAMPLES = """example:
  {command} --config configs/books_24m_alibi.yaml --output profile.json train.steps=3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_run(parser, "YAML file of the run; train.steps go before the profiled one")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .json to write")


def run(arguments: argparse.Namespace, place: Place) -> None:
    """Check everything, set up the device and torch.distributed, and profile."""
    config = load_config(arguments.config, arguments.overrides)
    set_environment(config)
    if place.world_size != 1:
        raise ConfigError(f"{place.world_size} ranks: a step is profiled on one rank; start it without a launcher")
    from megalibi.runtime.outputs import check_outputs

    check_outputs({"--output": arguments.output})
    job = start_job(config, place)

    from megalibi.measure.step_profile import profile_step  # not before the device is set up

    profile_step(job, arguments.output)


COMMAND = RankCommand(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
