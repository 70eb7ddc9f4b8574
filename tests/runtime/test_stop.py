from __future__ import annotations

import os
import signal
import time

import pytest

from megalibi.runtime.stop import REPEATED_SIGNAL_SECONDS, StopRequest
from tests.support.jobs import CONTEXT


def stop_twice(seconds_between: float) -> None:
    stop = StopRequest()
    signal.raise_signal(signal.SIGTERM)
    time.sleep(seconds_between)
    signal.raise_signal(signal.SIGTERM)
    os._exit(0 if stop.signal_name == "SIGTERM" else 1)


@pytest.mark.parametrize(("seconds_between", "code"), [(0.1, 0), (REPEATED_SIGNAL_SECONDS + 0.1, -signal.SIGTERM)])
def test_a_repeated_signal_is_a_launchers_and_a_later_one_ends_at_once(seconds_between: float, code: int) -> None:
    process = CONTEXT.Process(target=stop_twice, args=(seconds_between,))
    process.start()
    process.join()
    assert process.exitcode == code


def hang_up(handler: signal.Handlers) -> None:
    signal.signal(signal.SIGHUP, handler)
    stop = StopRequest()
    signal.raise_signal(signal.SIGHUP)
    os._exit({None: 3, "SIGHUP": 4}[stop.signal_name])


@pytest.mark.parametrize(("handler", "code"), [(signal.SIG_DFL, 4), (signal.SIG_IGN, 3)])
def test_the_end_of_the_terminal_stops_a_run_unless_nohup_said_otherwise(handler: signal.Handlers, code: int) -> None:
    process = CONTEXT.Process(target=hang_up, args=(handler,))
    process.start()
    process.join()
    assert process.exitcode == code
