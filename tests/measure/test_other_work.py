from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from megalibi.measure.other_work import OtherWork, count_busy_cores


@pytest.mark.parametrize(
    ("wall", "busy", "own", "cores"),
    [
        (10.0, 30.0, 10.0, 2.0),
        (10.0, 10.0, 10.0, 0.0),
        (10.0, 9.9, 10.0, 0.0),  # the clocks tick at different moments
        (10.0, 0.0, 10.0, None),  # a sandbox that counts nothing
        (0.0, 0.0, 0.0, None),
    ],
)
def test_cores_by_hand(wall: float, busy: float, own: float, cores: float | None) -> None:
    assert count_busy_cores(wall, busy, own) == cores


def test_a_process_beside_this_one_is_seen() -> None:
    busy = "import time\nend = time.monotonic() + 60\nprint(flush=True)\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-S", "-c", busy], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"  # from now on it is busy
        began, before = time.perf_counter(), psutil.Process(process.pid).cpu_times().user
        beside = OtherWork()
        time.sleep(0.5)
        took = psutil.Process(process.pid).cpu_times().user - before
        cores, wall = beside.busy_cores(), time.perf_counter() - began
        process.kill()
    assert cores is not None
    assert took > 0.0
    assert cores * wall > 0.8 * took  # whatever share of a full machine it got
