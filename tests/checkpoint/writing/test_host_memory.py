from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from megalibi.checkpoint.writing.host_memory import explain_lack, measure_available_bytes
from megalibi.parallel import WHOLE
from tests.support.ranks import run_on_ranks
from tests.support.runs import process_groups

MIB = 1 << 20


def plant(folder: Path, **values: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("memory_", "memory.")).write_text(f"{value}\n")


def test_the_tightest_cgroup_above_the_process_counts(tmp_path: Path) -> None:
    tree, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/job/step\n")
    plant(tree / "job/step", memory_max="max", memory_current=str(30 * MIB), memory_stat="anon 1")
    free = measure_available_bytes(tree, own)
    assert free == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    stat = f"anon 5\ninactive_file {10 * MIB}"
    plant(tree / "job", memory_max=str(50 * MIB), memory_current=str(45 * MIB), memory_stat=stat)
    assert measure_available_bytes(tree, own) == 15 * MIB
    plant(tree / "job/step", memory_max=str(20 * MIB))
    assert measure_available_bytes(tree, own) == 0  # it is over its limit
    own.write_text("12:pids:/job\n4:cpu,memory:/old\n")
    usage = {"memory_limit_in_bytes": str(9 * MIB), "memory_usage_in_bytes": str(4 * MIB)}
    plant(tree / "memory/old", **usage, memory_stat=f"total_inactive_file {MIB}")
    assert measure_available_bytes(tree, own) == 6 * MIB
    assert measure_available_bytes(tree, tmp_path / "none") > 0


def ask(sizes: list[int], available: int) -> str | None:
    world = process_groups(1).world
    return explain_lack(sizes[world.rank], world, available)


def test_the_copies_of_all_ranks_of_a_host_must_fit_into_half_of_what_is_left() -> None:
    assert run_on_ranks(2, ask, [2 * MIB, 3 * MIB], 10 * MIB) == [None, None]
    said = run_on_ranks(2, ask, [2 * MIB, 3 * MIB + 4], 10 * MIB)
    assert said[0] == said[1]
    assert said[0].startswith("the copies of the ranks on ")
    assert said[0].endswith(" take 5.2 MB, and it has 10.5 MB of memory left, of which they may take 50%")
    assert explain_lack(MIB, WHOLE.tensor) is None  # of this machine
