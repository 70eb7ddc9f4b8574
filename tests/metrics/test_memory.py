from __future__ import annotations

import mmap

import torch

from megalibi.metrics.memory import memory_bytes, memory_peak_bytes


def test_memory_follows_what_is_held_and_its_peak_remembers() -> None:
    before = memory_bytes("cpu")
    with mmap.mmap(-1, 64_000_000) as held:  # fresh pages: the heap may have room from what was freed before
        for _ in range(64):  # in pieces, for a heap may keep what a large one took
            held.write(b"x" * 1_000_000)
        assert memory_bytes(torch.device("cpu")) > before + 50_000_000
    assert memory_peak_bytes("cpu") > before + 50_000_000 > memory_bytes("cpu")
