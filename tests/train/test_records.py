from __future__ import annotations

import json
import re
import shutil
import socket
from datetime import datetime, timedelta, timezone
from pathlib import Path

import torch

from megalibi.checkpoint import list_checkpoints
from tests.support.jobs import Job, last_step, read_records, run_job, write_job

ROOT = Path(__file__).parents[2]


def test_a_run_says_what_it_is(tmp_path: Path) -> None:
    config = write_job(tmp_path, train={"steps": 1})
    job = run_job(config)
    run = tmp_path / "run"
    assert "from the start" in job.read_log(0)
    info = json.loads((run / "run_info.json").read_text())
    assert info["ranks"] == "1: tensor 1 x data 1"
    assert info["host"] == socket.gethostname()
    assert info["torch"] == torch.__version__
    assert "pretrain.py" in info["command"]
    assert str(config) in info["command"]
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", info["commit"])
    assert abs(datetime.now(timezone.utc) - datetime.fromisoformat(info["date"])) < timedelta(minutes=10)
    described = (ROOT / "docs" / "formats.md").read_text()
    assert [name for name in info if f"`{name}`" not in described] == []
    assert (run / "config.yaml").read_text() == config.read_text()


def test_a_run_goes_on_without_its_tensorboard_and_with_token_files_that_were_deleted(tmp_path: Path) -> None:
    config = write_job(tmp_path, data={"valid": str(tmp_path / "tokens")}, train={"steps": 60, "eval_every_steps": 20})
    run = tmp_path / "run"
    job = Job(config, world_size=2)
    job.wait_until(lambda: last_step(run) > 2)
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"tokens{suffix}").unlink()
    job.succeed()
    assert last_step(run) == 60
    assert [record["step"] for record in read_records(run) if "validation_loss" in record] == [20, 40, 60]
    assert list_checkpoints(run / "checkpoints")[-1].name == "step_00000060"
    assert job.output.count("TensorBoard failed and is left out from here on, training goes on") == 1
