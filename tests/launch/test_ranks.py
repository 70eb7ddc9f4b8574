from __future__ import annotations

import os
import runpy
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from megalibi.config import ConfigError

SCRIPT = Path(__file__).parents[2] / "launch" / "ranks.py"


@pytest.fixture(scope="module")
def find_place() -> Callable[[Mapping[str, str]], Any]:
    return runpy.run_path(str(SCRIPT))["find_place"]


def test_a_process_alone_needs_no_environment(find_place: Callable[[Mapping[str, str]], Any]) -> None:
    for environment in ({}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}):  # the latter: in a batch script, without srun
        place = find_place(environment)
        assert (place.rank, place.world_size, place.master_address) == (0, 1, "")


def test_every_launcher_tells_the_place(find_place: Callable[[Mapping[str, str]], Any]) -> None:
    common = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "12"}
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
             "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "MASTER_ADDR": "a"}  # fmt: skip
    for environment, port in (
        (common | {"LOCAL_WORLD_SIZE": "4"}, 12),  # torchrun
        (common | {"LOCAL_SIZE": "4"}, 12),  # deepspeed
        (slurm, 20_000 + 123_456 % 20_000),
        (slurm | {"MASTER_PORT": "12"}, 12),
    ):
        place = find_place(environment)
        assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 8, 1, 4)
        assert (place.master_address, place.master_port) == ("a", port)


def test_half_an_environment_is_refused(find_place: Callable[[Mapping[str, str]], Any]) -> None:
    with pytest.raises(ConfigError, match="the launcher's environment lacks 'WORLD_SIZE'"):
        find_place({"RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"})


@pytest.mark.parametrize(("backend", "expected"), [("nccl", 2), ("gloo", 5)])
def test_deepspeed_and_nccl_are_told_the_gpu_that_was_taken(
    backend: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = runpy.run_path(str(SCRIPT))
    place = ranks["Place"](rank=5, world_size=8, local_rank=5, local_world_size=8, master_address="a", master_port=12)
    given: dict[str, Any] = {}
    monkeypatch.setattr("torch.cuda.current_device", lambda: 2)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda **named: given.update(named))
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    ranks["init_distributed"](place, backend, timedelta(seconds=1))
    assert os.environ["LOCAL_RANK"] == str(expected)
    assert given.get("device_id") == (torch.device("cuda", 2) if backend == "nccl" else None)
    assert (given["backend"], given["rank"], given["world_size"]) == (backend, 5, 8)
