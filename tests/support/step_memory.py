"""What a training step holds, measured in a process of its own, where TEST_DEVICE says: for test_plan_memory.py.

``python -m tests.support.step_memory`` reads a pickled Config and writes a pickled MemoryByKind, as its last word. It
is a file, and no text in a test, so that ruff sees a name that is missing.
"""

from __future__ import annotations

import os
import pickle
import sys

import torch
import torch.distributed as dist

from megalibi.plan.memory_trace import measure_memory
from tests.support.device import COLLECTIVES, DEVICE, ON_GPU
from tests.support.steps import build_step, with_products_in_16_bits


def main() -> None:
    os.environ["LOCAL_RANK"] = "0"
    if ON_GPU:
        torch.cuda.set_device(0)
    dist.init_process_group(COLLECTIVES, store=dist.HashStore(), rank=0, world_size=1)
    engine, _, step = build_step(pickle.load(sys.stdin.buffer), torch.device(DEVICE))
    step()
    with with_products_in_16_bits():
        memory = measure_memory(engine, step, torch.device(DEVICE))
    sys.stdout.write(f"{pickle.dumps(memory).hex()}\n")


if __name__ == "__main__":
    main()
