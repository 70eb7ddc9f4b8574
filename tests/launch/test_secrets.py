from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support import hanging_rank
from tests.support.jobs import Job, ScriptJob, last_step, write_job

CANARY = "canary-of-a-password"
ENVIRONMENT = {"HF_TOKEN": CANARY, "MLFLOW_TRACKING_PASSWORD": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY}
REPORT = Path(__file__).parents[2] / "tools" / "report.py"


def find_canaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


def test_passwords_of_the_environment_are_in_no_file_of_a_run_and_in_no_output(tmp_path: Path) -> None:
    config, run = write_job(tmp_path, runtime={"hang_timeout_seconds": 4.0}), tmp_path / "run"
    refused = Job(config, "model.hiden_size=48", environments=[ENVIRONMENT])
    assert refused.wait() == [2]
    Job(config, environments=[ENVIRONMENT]).succeed()
    arguments = ["sleep", "--config", str(config), "train.steps=1000000"]
    hanging = ScriptJob(Path(hanging_rank.__file__), [arguments], tmp_path, [ENVIRONMENT])
    hanging.wait_until(lambda: last_step(run) >= 8)
    hanging.signal(signal.SIGUSR2)
    assert hanging.wait() == [1]
    assert (run / "hang" / "rank_00000.txt").exists()
    subprocess.run([sys.executable, str(REPORT), str(run)], env=os.environ | ENVIRONMENT, check=True, cwd=tmp_path)
    assert find_canaries(tmp_path) == []

    # What is asked for by its name is there, and so the search can find it.
    Job(config, f"train.output_dir={tmp_path}/${{oc.env:HF_TOKEN}}", environments=[ENVIRONMENT]).succeed()
    assert tmp_path / CANARY / "config.yaml" in find_canaries(tmp_path)
