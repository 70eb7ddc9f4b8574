"""Profile a step of a run on one GPU, or on the CPU: device time by kernel and by part of the step.

Example:
    python launch/profile_step.py --config configs/books_24m_alibi.yaml --output profile.json train.steps=3
"""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path

from cuda_environment import set_cuda_environment
from ranks import Place, init_distributed, run_rank, set_up_device

from megalibi.config import Config, ConfigError, load_config


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
    device = set_up_device(place)

    from megalibi.job import Job, check_run
    from megalibi.parallel import build_process_groups
    from megalibi.report.outputs import check_outputs
    from megalibi.studies.step_profile import profile_step

    check_outputs({"--output": output})
    derived, data = check_run(config, place.world_size)
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    init_distributed(place, "nccl" if device.type == "cuda" else "gloo", timeout)
    groups = build_process_groups(config.parallel.tensor_parallel_size, timeout)
    profile_step(Job(config=config, derived=derived, data=data, groups=groups, device=device), output)


if __name__ == "__main__":
    arguments = parse_arguments()
    run_rank(lambda place: run(load_config(arguments.config, arguments.overrides), place, arguments.output))
