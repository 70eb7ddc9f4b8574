"""Where the time of a training step goes: device time by kernel and by part of the step, and gaps between kernels."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from megalibi.config import Config, Derived, config_to_dict
from megalibi.engine.build import build_engine
from megalibi.files import write_json
from megalibi.measure.step_parts import (
    ATTENTION,
    BACKWARD_RANGE,
    FORWARD_RANGE,
    GELU,
    MATMUL,
    OTHER,
    PARTS,
    RESIDUAL,
    STEP_RANGE,
    find_part,
)
from megalibi.metrics.provenance import describe_run
from megalibi.model import count_parameters
from megalibi.plan import work_trace
from megalibi.plan.roofline import count_after_gradients, trace_work
from megalibi.plan.work_trace import Work
from megalibi.train.job import Job, open_loader
from megalibi.train.loop import take_step

_MAX_NAME = 160
"""Characters of a kernel's name that are kept: names of templates have thousands."""
_PART_OF_WORK = {
    **dict.fromkeys(work_trace.PRODUCTS, MATMUL),
    work_trace.SCORES: ATTENTION,
    work_trace.ACTIVATION: GELU,
    work_trace.RESIDUAL: RESIDUAL,
}
"""Name in a count of work -> part of the step, where the two differ."""


@dataclass(frozen=True)
class Slice:
    """The time of one kernel on a GPU; on a CPU that of one operation without the operations that it calls."""

    name: str
    """Name of the kernel or operation."""
    seconds: float
    """Seconds that it took in the profiled step."""
    path: tuple[str, ...]
    """What was running on the host when it was launched, innermost first."""


def profile_step(job: Job, output: Path) -> None:
    """Take ``train.steps`` steps, profile one more, and write what that step consists of. It works on one rank only.

    Args:
        job: The run, checked by check_run.
        output: The JSON file to write.
    """
    config, device = job.config, job.device
    engine = build_engine(config, job.derived, job.groups, device)
    for name, range_name in (("forward", FORWARD_RANGE), ("backward", BACKWARD_RANGE), ("step", STEP_RANGE)):
        setattr(engine, name, _in_range(getattr(engine, name), range_name))
    loader = open_loader(job)

    def time_step(step: int) -> float:
        batches = loader.micro_batches(step * config.train.global_batch_size)
        began = time.perf_counter()
        take_step(job, engine, batches, step)
        return time.perf_counter() - began

    step_seconds = [time_step(step) for step in range(config.train.steps)]
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        seconds = time_step(config.train.steps)
    loader.close()
    events = list(profiled.events() or [])
    span, busy = _device_times(events) if on_gpu else (seconds, None)
    slices = list(_kernels_of(events) if on_gpu else _operations_of(events))
    described = {
        "step_seconds": step_seconds,
        **summarize_profile(slices, span, busy),
        "work": {part: dataclasses.asdict(work) for part, work in count_work(config, job.derived).items()},
        "config": config_to_dict(config),
        "ranks": job.groups.world.size,
    }
    write_json({**described, **describe_run(str(device), ("torch", "triton", "deepspeed", "flash-attn"))}, output)


def count_work(config: Config, derived: Derived) -> dict[str, Work]:
    """Count what each part of an optimizer step computes and moves on a rank on CUDA; nothing is measured.

    Args:
        config: The configuration of the run.
        derived: What follows from it on its ranks.
    """
    parameters = count_parameters(config.model, derived.padded_vocab_size) // config.parallel.tensor_parallel_size
    micro_batch = trace_work(config, derived) | count_after_gradients(config, derived, parameters)
    work: dict[str, Work] = {}
    for name, done in micro_batch.items():
        part = _PART_OF_WORK.get(name, name)
        of_part = work.setdefault(part if part in PARTS else OTHER, Work())
        of_part.flops += done.flops * derived.accumulation_steps
        of_part.bytes += done.bytes * derived.accumulation_steps
    return work


def summarize_profile(slices: Iterable[Slice], span: float, busy: float | None = None) -> dict[str, Any]:
    """Add up what a step consists of.

    Args:
        slices: All slices of the step.
        span: Seconds from the beginning of the step to its end.
        busy: Seconds of these in which something ran; None means the sum of the slices.

    Returns:
        ``span_milliseconds``, ``busy_milliseconds``, ``parts_milliseconds``, and ``kernels``, the longest first.
    """
    parts = dict.fromkeys(PARTS, 0.0)
    kernels: dict[tuple[str, str], list[float]] = {}
    for piece in slices:
        part = find_part(piece.name, piece.path)
        parts[part] += 1e3 * piece.seconds
        kernels.setdefault((piece.name[:_MAX_NAME], part), []).append(1e3 * piece.seconds)
    ordered = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    return {
        "span_milliseconds": 1e3 * span,
        "busy_milliseconds": sum(parts.values()) if busy is None else 1e3 * busy,
        "parts_milliseconds": parts,
        "kernels": [
            {"name": name, "part": part, "calls": len(times), "milliseconds": sum(times)}
            for (name, part), times in ordered
        ],
    }


def _in_range(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        with record_function(name):
            return function(*arguments, **named)

    return run


def _path_of(event: Any) -> Iterator[str]:
    while event is not None:
        yield str(event.name)
        event = event.cpu_parent


def _operations_of(events: Iterable[Any]) -> Iterator[Slice]:
    """Yield the operations on the CPU, each without the operations that it calls."""
    for event in events:
        if event.self_cpu_time_total > 0:
            name, *path = _path_of(event)
            yield Slice(name, event.self_cpu_time_total / 1e6, tuple(path))


def _kernels_of(events: Sequence[Any]) -> Iterator[Slice]:
    """Yield the kernels of a GPU, each with the operation that launched it as far as the profiler knows it."""
    shadows = _names_of_ranges(events)
    unknown: dict[str, float] = {}
    for event in events:
        if event.device_type == DeviceType.CUDA:
            if event.name not in shadows:
                unknown[event.name] = unknown.get(event.name, 0.0) + _microseconds(event)
        elif event.kernels:
            path = tuple(_path_of(event))
            for kernel in event.kernels:
                if kernel.name not in shadows:
                    unknown[kernel.name] = unknown.get(kernel.name, 0.0) - kernel.duration
                    yield Slice(kernel.name, kernel.duration / 1e6, path)
    for name, rest in unknown.items():
        if rest > 1.0:  # a microsecond or less comes from rounding
            yield Slice(name, rest / 1e6, ())


def _names_of_ranges(events: Iterable[Any]) -> set[str]:
    """Return the names of the host's ranges. The profiler shows them on the device too, where they are not kernels."""
    return {event.name for event in events if event.is_user_annotation} | {FORWARD_RANGE, BACKWARD_RANGE, STEP_RANGE}


def _microseconds(event: Any) -> float:
    return float(event.time_range.end - event.time_range.start)


def _device_times(events: Sequence[Any]) -> tuple[float, float]:
    """Return the seconds from the start of the first kernel to the end of the last, and those in which a kernel ran."""
    shadows = _names_of_ranges(events)
    times = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and event.name not in shadows
    )
    busy, until = 0.0, float("-inf")
    for start, end in times:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return (until - times[0][0]) / 1e6 if times else 0.0, busy / 1e6
