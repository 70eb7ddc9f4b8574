"""From a configuration to this rank's part of a job: how every command begins that takes training steps."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from megalibi.config import Config
from megalibi.runtime.device import set_up_device
from megalibi.runtime.ranks import Place, init_distributed

if TYPE_CHECKING:
    from megalibi.train.job import Job


def start_job(config: Config, place: Place) -> Job:
    """Set up the device, check everything, join the other ranks and compare with them; after set_environment.

    Args:
        config: The run.
        place: Where this process stands in the job.

    Raises:
        UserError: Something cannot be used, or the ranks do not agree.
    """
    # The imports stand here because they take seconds, and the configuration is known to be sound by now.
    device = set_up_device(place)

    from megalibi.parallel import build_process_groups, check_same
    from megalibi.train.agreement import describe_facts
    from megalibi.train.check import check_run
    from megalibi.train.job import Job

    derived, data = check_run(config, place.world_size)
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    init_distributed(place, "nccl" if device.type == "cuda" else "gloo", timeout)
    check_same(describe_facts(config, data.identity), device)
    groups = build_process_groups(config.parallel.tensor_parallel_size, timeout)
    return Job(config=config, derived=derived, data=data, groups=groups, device=device)
