from __future__ import annotations

import os
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalibi.errors import ConfigError, UserError
from tests.support.ranks import find_free_port, run_on_ranks

SCRIPT = Path(__file__).parents[2] / "megalibi" / "runtime" / "ranks.py"
OWN_GPUS = SCRIPT.with_name("own_gpus.py")


@pytest.fixture(scope="module", autouse=True)
def import_as_a_script_does() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield


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


COMPLETE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "12"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": None}, "the launcher's environment lacks WORLD_SIZE: start with deepspeed, torchrun or srun"),
        ({"LOCAL_RANK": None}, "lacks LOCAL_RANK: "),
        ({"MASTER_ADDR": None}, "has RANK but no MASTER_ADDR: start with deepspeed, torchrun or srun, or unset RANK"),
        ({"MASTER_PORT": None}, "lacks MASTER_PORT: "),
        ({"MASTER_PORT": "65536"}, "has MASTER_PORT='65536': a whole number from 1 to 65535 is allowed"),
        ({"RANK": "x"}, "has RANK='x': a whole number from 0 to 1 is allowed"),
        ({"RANK": "2"}, "has RANK='2': a whole number from 0 to 1 is allowed"),
        ({"RANK": "-1"}, "has RANK='-1': a whole number from 0 to 1 is allowed"),
        ({"RANK": "1" * 5000}, "a whole number from 0 to 1 is allowed"),
        ({"WORLD_SIZE": "0"}, "has WORLD_SIZE='0': a whole number of at least 1 is allowed"),
    ],
)
def test_half_an_environment_is_refused(
    find_place: Callable[[Mapping[str, str]], Any], changes: dict[str, str | None], message: str
) -> None:
    environment = {name: value for name, value in (COMPLETE | changes).items() if value is not None}
    with pytest.raises(ConfigError, match=re.escape(message)):
        find_place(environment)


def test_half_of_slurms_environment_is_refused(find_place: Callable[[Mapping[str, str]], Any]) -> None:
    environment = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "7"}
    with pytest.raises(ConfigError, match="the launcher's environment lacks SLURM_STEP_NODELIST"):
        find_place(environment)
    with pytest.raises(ConfigError, match=r"'scontrol show hostnames no such host' failed: .*; export MASTER_ADDR"):
        find_place(environment | {"SLURM_STEP_NODELIST": "no such host"})


@pytest.mark.parametrize(("backend", "expected"), [("nccl", 2), ("gloo", 5)])
def test_deepspeed_and_nccl_are_told_the_gpu_that_was_taken(
    backend: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = runpy.run_path(str(SCRIPT))
    place = ranks["Place"](
        rank=0, world_size=1, local_rank=5, local_world_size=8, master_address="127.0.0.1", master_port=find_free_port()
    )
    given: dict[str, Any] = {}
    monkeypatch.setattr("torch.cuda.current_device", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(uuid="GPU-2"))
    monkeypatch.setattr("torch.distributed.init_process_group", lambda **named: given.update(named))
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    ranks["init_distributed"](place, backend, timedelta(seconds=10))
    assert os.environ["LOCAL_RANK"] == str(expected)
    assert given.get("device_id") == (torch.device("cuda", 2) if backend == "nccl" else None)
    assert (given["backend"], given["rank"], given["world_size"]) == (backend, 0, 1)


REFUSAL = ": start one rank for each GPU, or compute on the CPU with DS_ACCELERATOR=cpu"


@pytest.mark.parametrize(
    ("taken", "refusal"),
    [
        ([("a", "1")], ""),
        ([("a", "1"), ("a", "2"), ("b", "3"), ("b", "4")], ""),
        ([("a", "1"), ("a", "1")], "2 ranks on a have 1 GPU between them (ranks 0 and 1 the same)"),
        (
            [("a", "1"), ("b", "3"), ("b", "4"), ("b", "4"), ("b", "3")],
            "4 ranks on b have 2 GPUs between them (ranks 2 and 3 the same)",
        ),
    ],
    ids=["alone", "two hosts, a GPU for each rank", "one GPU for two", "two GPUs for four"],
)
def test_two_ranks_on_one_gpu_are_refused_with_their_numbers(taken: list[tuple[str, str]], refusal: str) -> None:
    assert runpy.run_path(str(OWN_GPUS))["describe_shared_gpu"](taken) == (refusal and refusal + REFUSAL)


def _meet(gpus: list[str], port: int) -> str:
    """Meet at a store of the job's own; return what is refused."""
    rank, size = torch.distributed.get_rank(), len(gpus)
    check_own_gpus = runpy.run_path(str(OWN_GPUS))["check_own_gpus"]
    store = torch.distributed.TCPStore("127.0.0.1", port, size, rank == 0, timedelta(seconds=30))
    try:
        check_own_gpus(rank, size, gpus[rank], torch.distributed.PrefixStore("gpus", store))
    except UserError as error:
        return str(error)
    torch.distributed.barrier()  # a run keeps its store; here it ends with rank 0's, which others may still read
    return ""


def test_every_rank_learns_that_two_share_a_gpu() -> None:
    """What each sees in its environment is the same: one GPU."""
    refused, accepted = (run_on_ranks(2, _meet, gpus, find_free_port()) for gpus in (["1", "1"], ["1", "2"]))
    said = f"2 ranks on {socket.gethostname()} have 1 GPU between them (ranks 0 and 1 the same){REFUSAL}"
    assert refused == [said, said]
    assert accepted == ["", ""]


ON_THE_CPU = """
import os, sys
sys.path.insert(0, sys.argv[1])
from megalibi.runtime import ranks
print(ranks.set_up_device(ranks.find_place({})))
from deepspeed.accelerator import get_accelerator
import torch
print(get_accelerator().device_name(), torch.cuda.device_count(), repr(os.environ["CUDA_VISIBLE_DEVICES"]))
"""


def test_a_process_that_is_told_so_computes_on_the_cpu_wherever_it_is() -> None:
    """DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES for its ranks, on a CPU too."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "0"}
    command = [sys.executable, "-c", ON_THE_CPU, str(SCRIPT.parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["cpu", "cpu 0 ''"]


@pytest.mark.parametrize("told", ["cuda", "xpu"])
def test_an_accelerator_that_is_not_here_is_refused(told: str) -> None:
    check_accelerator = runpy.run_path(str(SCRIPT))["check_accelerator"]
    with pytest.raises(ConfigError, match=f"DS_ACCELERATOR={told} in the environment, but torch finds no GPU on "):
        check_accelerator({"DS_ACCELERATOR": told})
    check_accelerator({"DS_ACCELERATOR": "cpu"})
    check_accelerator({})
