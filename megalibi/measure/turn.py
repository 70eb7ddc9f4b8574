"""One turn of a speed measurement: a fresh job takes steps on real text and writes their times and their memory."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

from megalibi.config import config_to_dict
from megalibi.engine.build import build_engine
from megalibi.engine.step import StepResult
from megalibi.files import write_json
from megalibi.measure.other_work import OtherWork, read_load_average
from megalibi.metrics.memory import memory_peak_bytes
from megalibi.metrics.provenance import describe_run, hash_code
from megalibi.plan.memory_trace import measure_memory
from megalibi.runtime.stop import read_together
from megalibi.train.job import Job, open_loader
from megalibi.train.loop import take_step
from megalibi.train.nonfinite import check_finite


def measure_turn(job: Job, output: Path) -> None:
    """Time ``train.steps`` steps, take one more to measure the memory by kind, and write the turn. Every rank calls it.

    The peaks are those of a process that has done nothing else. Rank 0 writes the file; there is no checkpoint.

    Args:
        job: The run, checked by check_run, and this rank's place in it.
        output: The JSON file to write.

    Raises:
        DataError: A rank cannot read its data.
        DivergenceError: The loss or the gradient is not finite.
        FileError: The output cannot be written.
    """
    code, load_before = hash_code(), read_load_average()
    config, groups, device = job.config, job.groups, job.device
    engine = build_engine(config, job.derived, groups, device)
    loader = open_loader(job)

    def read_and_step(step: int) -> StepResult:
        batches = read_together(lambda: loader.micro_batches(step * config.train.global_batch_size), groups, device)
        return take_step(job, engine, batches, step)

    step_seconds, other_work = [], OtherWork()
    for step in range(config.train.steps):
        began = time.perf_counter()
        result = read_and_step(step)  # reading its loss back waits for the device
        step_seconds.append(time.perf_counter() - began)
        check_finite(step + 1, result, config.train.precision, "measure")
    other_busy_cores, load_after = other_work.busy_cores(), read_load_average()
    device_bytes = device_peak_bytes(device)  # before tracing the memory takes some itself
    memory = measure_memory(engine, lambda: read_and_step(config.train.steps), device)
    loader.close()
    if groups.world.rank == 0:
        turn = {
            "step_seconds": step_seconds,
            "load_before": load_before,
            "load_after": load_after,
            # Each rank knows its own work alone, and would take that of the others for a disturbance.
            "other_busy_cores": other_busy_cores if groups.world.size == 1 else None,
            "device_bytes": device_bytes,
            "memory": dataclasses.asdict(memory),
            "config": config_to_dict(config),
            "ranks": groups.world.size,
            "code": code,
            **describe_run(str(device), ("torch", "deepspeed")),
        }
        write_json(turn, output)


def device_peak_bytes(device: torch.device) -> int:
    """Return the bytes of the device's memory that were in use at the peak, libraries included.

    On CUDA that is everything in use now, because PyTorch keeps what it has once allocated; elsewhere it is the largest
    resident set of the process.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free)
    return memory_peak_bytes(device)
