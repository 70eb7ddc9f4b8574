from __future__ import annotations

import os
import re
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalibi.errors import ConfigError
from megalibi.runtime.ranks import Place, find_place, init_distributed
from tests.support.ranks import find_free_port


def test_a_process_alone_needs_no_environment() -> None:
    batch_script = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}  # without srun
    for environment in ({}, batch_script, {"PMI_RANK": "0", "PMI_SIZE": "1"}):
        place = find_place(environment)
        assert (place.rank, place.world_size, place.master_address) == (0, 1, "")


def test_every_launcher_tells_the_place() -> None:
    common = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "12"}
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
             "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "MASTER_ADDR": "a"}  # fmt: skip
    mpi = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_ADDR": "a"}  # fmt: skip
    one_per_host = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    for environment, port in (
        (common | {"LOCAL_WORLD_SIZE": "4"}, 12),  # torchrun
        (common | {"LOCAL_SIZE": "4"}, 12),  # deepspeed
        (slurm, 20_000 + 123_456 % 20_000),
        (slurm | {"MASTER_PORT": "12"}, 12),
        (mpi, 29_500),
        (mpi | {"MASTER_PORT": "12"}, 12),
        (mpi | one_per_host, 29_500),  # mpirun has started its own processes by srun
        (common | {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"} | one_per_host, 12),  # srun torchrun
        (common | {"LOCAL_SIZE": "4", "CROSS_RANK": "1"} | one_per_host, 12),  # deepspeed
        (common | {"LOCAL_SIZE": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, 12),  # srun --pty bash
        (common | {"LOCAL_SIZE": "4"} | slurm | {"MASTER_PORT": "12"}, 12),  # told by hand what srun says
    ):
        place = find_place(environment)
        assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 8, 1, 4)
        assert (place.master_address, place.master_port) == ("a", port)


COMPLETE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "12"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"WORLD_SIZE": None},
            "the launcher's environment lacks WORLD_SIZE: start with deepspeed, torchrun, srun or mpirun",
        ),
        ({"LOCAL_RANK": None}, "lacks LOCAL_RANK: "),
        (
            {"MASTER_ADDR": None},
            "has RANK but no MASTER_ADDR: start with deepspeed, torchrun, srun or mpirun, or unset RANK",
        ),
        ({"MASTER_PORT": None}, "lacks MASTER_PORT: "),
        (
            {"MASTER_PORT": "65536"},
            "MASTER_PORT='65536' in the launcher's environment: must be a whole number from 1 to 65535",
        ),
        ({"RANK": "x"}, "RANK='x' in the launcher's environment: must be a whole number from 0 to 1"),
        ({"RANK": "2"}, "RANK='2' in the launcher's environment: must be a whole number from 0 to 1"),
        ({"RANK": "-1"}, "RANK='-1' in the launcher's environment: must be a whole number from 0 to 1"),
        ({"RANK": "1" * 5000}, "in the launcher's environment: must be a whole number from 0 to 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' in the launcher's environment: must be a whole number of at least 1"),
        (
            {"LOCAL_WORLD_SIZE": "1"},
            "LOCAL_RANK=1, LOCAL_WORLD_SIZE=1, WORLD_SIZE=2 in the launcher's environment: must be in ascending order",
        ),
        ({"LOCAL_SIZE": "3"}, "LOCAL_RANK=1, LOCAL_SIZE=3, WORLD_SIZE=2 in the launcher's environment: must be in asc"),
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            "RANK=1 in the launcher's environment contradicts SLURM_PROCID=0: unset RANK, WORLD_SIZE and LOCAL_RANK",
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"},
            "WORLD_SIZE=2 in the launcher's environment contradicts OMPI_COMM_WORLD_SIZE=4: unset RANK",
        ),
        ({"RANK": None, "PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_SIZE=2 in the environment: this launcher's variables"),
    ],
)
def test_half_an_environment_is_refused(changes: dict[str, str | None], message: str) -> None:
    environment = {name: value for name, value in (COMPLETE | changes).items() if value is not None}
    with pytest.raises(ConfigError, match=re.escape(message)):
        find_place(environment)


def test_half_of_slurms_environment_is_refused() -> None:
    environment = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "7"}
    with pytest.raises(ConfigError, match="the launcher's environment lacks SLURM_STEP_NODELIST"):
        find_place(environment)
    with pytest.raises(ConfigError, match=r"'scontrol show hostnames no such host' failed: .*; export MASTER_ADDR"):
        find_place(environment | {"SLURM_STEP_NODELIST": "no such host"})


def test_mpirun_on_one_host_needs_no_address_and_on_several_asks_for_it() -> None:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    environment = {f"OMPI_COMM_WORLD_{name}": value for name, value in zip(names, "1212", strict=True)}
    assert find_place(environment).master_address == "127.0.0.1"
    with pytest.raises(ConfigError, match="has OMPI_COMM_WORLD_RANK but no MASTER_ADDR: name rank 0's host, as in mpi"):
        find_place(environment | {"OMPI_COMM_WORLD_SIZE": "4"})


@pytest.mark.parametrize(("backend", "expected"), [("nccl", 2), ("gloo", 5)])
def test_deepspeed_and_nccl_are_told_the_gpu_that_was_taken(
    backend: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(
        rank=0, world_size=1, local_rank=5, local_world_size=8, master_address="127.0.0.1", master_port=find_free_port()
    )
    given: dict[str, Any] = {}
    monkeypatch.setattr("torch.cuda.current_device", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(uuid="GPU-2"))
    monkeypatch.setattr("torch.distributed.init_process_group", lambda **named: given.update(named))
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    init_distributed(place, backend, timedelta(seconds=10))
    assert os.environ["LOCAL_RANK"] == str(expected)
    assert given.get("device_id") == (torch.device("cuda", 2) if backend == "nccl" else None)
    assert (given["backend"], given["rank"], given["world_size"]) == (backend, 0, 1)
