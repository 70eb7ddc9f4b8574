"""Profile a step of a run on one GPU, or on the CPU: device time by kernel and by part of the step.

Example:
    python launch/profile_step.py --config configs/books_24m_alibi.yaml --output profile.json train.steps=3
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megalibi.config import Config, load_config
from megalibi.errors import ConfigError
from megalibi.runtime.cuda_environment import set_cuda_environment
from megalibi.runtime.exit import run_rank
from megalibi.runtime.ranks import Place
from megalibi.train.start import start_job


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the run; train.steps go before the profiled one")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .json to write")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="values that win over the file")
    return parser.parse_intermixed_args()


def run(config: Config, place: Place, output: Path) -> None:
    """Check everything, set up the device and torch.distributed, and profile."""
    set_cuda_environment(config)
    if place.world_size != 1:
        raise ConfigError(f"{place.world_size} ranks: a step is profiled on one, start it with python alone")
    from megalibi.metrics.outputs import check_outputs

    check_outputs({"--output": output})
    job = start_job(config, place)

    from megalibi.measure.step_profile import profile_step  # not before the device is set up

    profile_step(job, output)


if __name__ == "__main__":
    arguments = parse_arguments()
    run_rank(lambda place: run(load_config(arguments.config, arguments.overrides), place, arguments.output))
