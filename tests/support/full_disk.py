"""Trains on a disk that fills up; test_save.py mounts one for this process alone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from megalibi.checkpoint import Checkpoint
from tests.support.jobs import Job, last_step, run_job, write_job

FREE_BYTES = (0, 20_000, 100_000, 300_000, 500_000, 700_000)
"""From no room for a line of metrics, over the weights and the optimizer of either rank, to the manifest."""


def leave_free(disk: Path, num_bytes: int) -> Path:
    filler = disk / "filler"
    statistics = os.statvfs(disk)
    filler.write_bytes(bytes(max(0, statistics.f_bavail * statistics.f_frsize - num_bytes)))
    return filler


def main() -> None:
    disk, elsewhere = Path(sys.argv[1]), Path(sys.argv[2])
    config = write_job(
        elsewhere,
        parallel={"tensor_parallel_size": 2},
        train={"steps": 2, "output_dir": str(disk / "run")},
    )
    checkpoints = disk / "run" / "checkpoints"
    run_job(config, world_size=2)
    cases = []
    for free_bytes in FREE_BYTES:
        filler = leave_free(disk, free_bytes)
        job = Job(config, "train.steps=5", world_size=2)  # the save of step 4 is in the background
        codes = job.wait()
        kept = checkpoints / "step_00000002"
        cases.append(
            {
                "free_bytes": free_bytes,
                "codes": codes,
                "log": job.read_log(0),
                "checkpoints": sorted(path.name for path in checkpoints.iterdir()),
                "damage": list(Checkpoint.open(kept).find_damage()),
            }
        )
        filler.unlink()
    job = Job(config, "train.steps=4", world_size=2)
    json.dump({"cases": cases, "after": {"codes": job.wait(), "last_step": last_step(disk / "run")}}, sys.stdout)


if __name__ == "__main__":
    main()
