from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch

from megalibi.errors import ConfigError
from megalibi.runtime.own_gpus import check_own_gpus, describe_shared_gpu
from tests.support.ranks import find_free_port, run_on_ranks

REFUSAL = ": start one rank for each GPU, or compute on the CPU with DS_ACCELERATOR=cpu"


@pytest.mark.parametrize(
    ("taken", "refusal"),
    [
        ([("a", "1")], ""),
        ([("a", "1"), ("a", "2"), ("b", "3"), ("b", "4")], ""),
        ([("a", "1"), ("a", "1")], "2 ranks on a have 1 GPU between them (ranks 0 and 1 took the same)"),
        (
            [("a", "1"), ("b", "3"), ("b", "4"), ("b", "4"), ("b", "3")],
            "4 ranks on b have 2 GPUs between them (ranks 2 and 3 took the same)",
        ),
    ],
    ids=["alone", "two hosts, a GPU for each rank", "one GPU for two", "two GPUs for four"],
)
def test_two_ranks_on_one_gpu_are_refused_with_their_numbers(taken: list[tuple[str, str]], refusal: str) -> None:
    assert describe_shared_gpu(taken) == (refusal and refusal + REFUSAL)


def _meet(gpus: list[str], port: int) -> str:
    """Meet at a store of the job's own; return what is refused."""
    rank, size = torch.distributed.get_rank(), len(gpus)
    store = torch.distributed.TCPStore("127.0.0.1", port, size, rank == 0, timedelta(seconds=30))
    try:
        check_own_gpus(rank, size, gpus[rank], torch.distributed.PrefixStore("gpus", store))
    except ConfigError as error:
        return str(error)
    torch.distributed.barrier()  # a run keeps its store; here it ends with rank 0's, which others may still read
    return ""


def test_every_rank_learns_that_two_share_a_gpu() -> None:
    """What each sees in its environment is the same: one GPU."""
    refused, accepted = (run_on_ranks(2, _meet, gpus, find_free_port()) for gpus in (["1", "1"], ["1", "2"]))
    said = f"2 ranks on {socket.gethostname()} have 1 GPU between them (ranks 0 and 1 took the same){REFUSAL}"
    assert refused == [said, said]
    assert accepted == ["", ""]
