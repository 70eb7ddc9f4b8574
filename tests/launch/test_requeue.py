"""launch/slurm/requeue.sh where no SLURM is needed; tests/cluster/test_slurm.py has the rest."""

from __future__ import annotations

import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm" / "requeue.sh"


def test_a_job_whose_failures_cannot_be_counted_does_not_start(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    environment = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(gone), "MAX_FAILURES": "3", "PATH": "/usr/bin:/bin"}
    command = ["bash", "-c", f"source {SCRIPT}; train_and_requeue --config c.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: {gone}/slurm-7.failures, which counts the failures of job 7, cannot be written: make room for it"
    )
