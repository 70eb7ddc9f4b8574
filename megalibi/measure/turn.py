"""One turn of a speed measurement: a fresh job builds its engine, takes steps on real text and says what they took."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

from megalibi.config import config_to_dict
from megalibi.engine.build import build_engine
from megalibi.engine.step import StepResult
from megalibi.metrics.memory import memory_peak_bytes
from megalibi.metrics.provenance import describe_run, write_json
from megalibi.plan.memory_trace import measure_memory
from megalibi.runtime.stop import read_together
from megalibi.train.job import Job, open_loader
from megalibi.train.loop import check_finite, take_step


def measure_turn(job: Job, output: Path) -> None:
    """Take ``train.steps`` steps and one more for the memory by kind; rank 0 writes the turn. Every rank calls it.

    The peaks are those of a process that has done nothing else. No checkpoint is written.

    Args:
        job: The run, checked by check_run, and this rank's place in it.
        output: The JSON file to write.
    """
    config, groups, device = job.config, job.groups, job.device
    engine = build_engine(config, job.derived, groups, device)
    loader = open_loader(job)

    def read_and_step(step: int) -> StepResult:
        batches = read_together(lambda: loader.micro_batches(step * config.train.global_batch_size), groups, device)
        return take_step(job, engine, batches, step)

    step_seconds = []
    for step in range(config.train.steps):
        began = time.perf_counter()
        result = read_and_step(step)  # its loss is read back, so the device has finished
        step_seconds.append(time.perf_counter() - began)
        check_finite(step + 1, result, config.train.precision, "measure")
    device_bytes = device_peak_bytes(device)  # before the profiler takes memory of its own
    memory = measure_memory(engine, lambda: read_and_step(config.train.steps), device)
    loader.close()
    if groups.world.rank == 0:
        turn = {
            "step_seconds": step_seconds,
            "device_bytes": device_bytes,
            "memory": dataclasses.asdict(memory),
            "config": config_to_dict(config),
            "ranks": groups.world.size,
            **describe_run(str(device), ("torch", "deepspeed")),
        }
        write_json(turn, output)


def device_peak_bytes(device: torch.device) -> int:
    """Return the most memory that the device has given, libraries included.

    On CUDA that is all that is taken of it now, for PyTorch keeps what it once had; elsewhere the process's highest
    resident set.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free)
    return memory_peak_bytes(device)
