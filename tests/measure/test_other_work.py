from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megalibi.measure.other_work import OtherWork, count_busy_cores, read_load_average


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
    busy = "import time; end = time.monotonic() + 0.5\nwhile time.monotonic() < end: pass"
    beside = OtherWork()
    subprocess.run([sys.executable, "-S", "-c", busy], check=True)
    cores = beside.busy_cores()
    assert cores is not None
    assert cores > 0.5


def test_the_load_is_that_of_the_system() -> None:
    load = read_load_average()
    assert load is not None
    assert load == pytest.approx(os.getloadavg()[0], abs=1.0)
