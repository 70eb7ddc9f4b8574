from __future__ import annotations

import time

import pytest
import torch

from megalibi.parallel.stopwatch import Stopwatch
from tests.support.device import DEVICE, ON_GPU


@pytest.mark.gpu
def test_spans_add_up_and_are_taken_once() -> None:
    stopwatch, device = Stopwatch(), torch.device(DEVICE)
    x = torch.ones(512, 512, device=device)
    began = time.perf_counter()
    for _ in range(2):
        with stopwatch.running(device):
            for _ in range(20):
                x = x @ x / 512
            if not ON_GPU:
                time.sleep(0.01)
    assert x[0, 0].item() == 1.0  # which waits for the device
    passed = time.perf_counter() - began
    seconds = stopwatch.take_seconds()
    assert (1e-5 if ON_GPU else 0.02) < seconds <= passed
    assert stopwatch.take_seconds() == 0.0
