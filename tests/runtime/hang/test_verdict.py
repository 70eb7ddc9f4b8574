from __future__ import annotations

from typing import Any

from megalibi.runtime.hang.signs import RankSign, WatchedRank
from megalibi.runtime.hang.verdict import name_culprits
from megalibi.runtime.hang.whereabouts import describe_ranks

HOSTS = ["a", "a", "b", "b", "c", "c"]


def sign(rank: int, **fields: Any) -> RankSign:
    known = {
        "host": HOSTS[rank],
        "pid": 1,
        "started": 0.0,
        "number": 2,
        "progress": 5,
        "step": 7,
        "marks": 20,
        "words": "all_reduce of ranks 0-5",
        "is_collective": True,
    }
    return RankSign(rank=rank, **{**known, **fields})


def judge(own: RankSign, *others: RankSign, silent: tuple[int, ...] = ()) -> str:
    seen = {
        other.rank: WatchedRank(sign=other, is_alive=other.rank not in silent, progress_seconds=0.0) for other in others
    }
    return name_culprits(own, seen, HOSTS)


def test_a_rank_alone_has_nobody_to_blame() -> None:
    assert judge(sign(0)) == ""


def test_ranks_that_give_no_sign_are_named_first_three_at_most() -> None:
    others = [sign(rank) for rank in range(1, 6)]
    last = "(after step 7, last seen in all_reduce of ranks 0-5)"
    assert judge(sign(0), *others, silent=(3,)) == f"rank 3 on b gives no sign of life {last}"
    said = judge(sign(0), *others, silent=(1, 2, 3, 4, 5))
    assert said.startswith(f"rank 1 on a gives no sign of life {last}, rank 2 on b gives")
    assert said.endswith(f"rank 3 on b gives no sign of life {last}, and 2 more")
    seen = {1: WatchedRank(sign=None, is_alive=False, progress_seconds=0.0)}
    assert name_culprits(sign(0), seen, HOSTS) == "rank 1 on a gives no sign of life"


def test_who_is_in_no_collective_is_to_blame_and_else_who_is_behind() -> None:
    reading = sign(2, words="a data read (x.py:1, read)", is_collective=False)
    assert judge(sign(0), sign(1), reading) == "rank 2 on b is in no collective: it is in a data read (x.py:1, read)"
    assert judge(reading, sign(0), sign(1)) == "this rank is in no collective"
    late = sign(2, marks=19, words="all_reduce of ranks 2-3")
    assert judge(sign(0), sign(1), late) == "rank 2 on b is behind the others: it is in all_reduce of ranks 2-3"
    # Of NCCL's collectives the host sees nothing: it waits for its GPU.
    waiting = {"words": "Python code (step.py:9, train_step)", "is_collective": False}
    ranks = [sign(rank, **waiting) for rank in (0, 1)]
    assert judge(*ranks, sign(2, step=6, marks=30, **waiting)).startswith("rank 2 on b is behind the others: it is in ")


def test_where_all_wait_for_each_other_the_network_between_hosts_is_suspect() -> None:
    assert name_culprits(sign(0), {1: WatchedRank(sign=sign(1), is_alive=True, progress_seconds=0.0)}, ["a", "a"]) == (
        "all 2 ranks are in collectives"
    )
    assert judge(sign(0), *map(sign, range(1, 6))) == (
        "all 6 ranks are in collectives: look at the network between a, b, c"
    )


def test_ranks_in_words() -> None:
    assert describe_ranks([3]) == "rank 3"
    assert describe_ranks([2, 3, 4]) == "ranks 2-4"
    assert describe_ranks([0, 4, 8]) == "ranks 0, 4, 8"
    assert describe_ranks(range(0, 64, 4)) == "16 ranks from 0 to 60"
