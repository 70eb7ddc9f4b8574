"""What a run whose memory ran out is told: the plan's figure, and the settings with which less is planned."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator

from megalibi.config import Config, Derived, derive
from megalibi.log import get_logger
from megalibi.plan.run_plan import plan_memory, plan_run
from megalibi.runtime.shortage import ADVICE, Shortage
from megalibi.units import format_bytes

_LOGGER = get_logger(__name__)
_UNFUSED = ("unfused", "reference")
"""The back ends of attention that write the scores to memory."""
_MAX_SHOWN = 3
_WORTHWHILE = 0.98
"""The share of the planned memory that a setting must leave at most, to be named."""


def explain_shortage(shortage: Shortage, config: Config, world_size: int, device_type: str) -> str:
    """Return in one line what memory ran out, how much was asked for, what is planned, and what lowers it.

    Args:
        shortage: What was missing.
        config: The configuration of the run.
        world_size: The number of ranks of the job.
        device_type: Where the run computes: cuda or cpu.
    """
    asked = (
        shortage.said if shortage.asked_bytes is None else f"{format_bytes(shortage.asked_bytes)} more were asked for"
    )
    line = f"not enough memory on {socket.gethostname()}, the {shortage.kind}'s: {asked}"
    try:
        if shortage.kind == "host" and device_type == "cuda":
            return f"{line}; {_advise_host(config, world_size)}"
        return f"{line}; {_advise_device(config, derive(config, world_size), device_type)}"
    except Exception as error:  # the plan takes memory, too, and a model that no memory holds cannot be planned
        _LOGGER.debug("no plan: %s", error)
        return f"{line}; {ADVICE}"


def _advise_device(config: Config, derived: Derived, device_type: str) -> str:
    """Return what a rank is planned with, and with which settings it is planned with less."""
    attention = "unfused" if config.model.attention_backend in _UNFUSED else "fused"
    memory = plan_memory(config, derived, attention=attention, device_type=device_type)
    parts = ", ".join(
        f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in dataclasses.asdict(memory).items() if size
    )
    less = []
    for name, other in _list_alternatives(config, derived):
        planned = plan_memory(other, derive(other, derived.world_size), attention=attention, device_type=device_type)
        if planned.total < _WORTHWHILE * memory.total:
            less.append((planned.total, name))
    settings = ", ".join(f"{name} ({format_bytes(total)})" for total, name in sorted(less)[:_MAX_SHOWN])
    settings = settings or "a smaller model or data.seq_length, or on more ranks"
    return (
        f"a rank of this run is planned with {format_bytes(memory.total)} at the peak of a step ({parts}), beside "
        f"Python and its libraries; less is planned with {settings}"
    )


def _advise_host(config: Config, world_size: int) -> str:
    """Return what a rank of a GPU holds in the host's memory, and what lowers it."""
    copy_bytes = plan_run(config, world_size).snapshot_bytes
    if not copy_bytes:
        return (
            "the plan of this run holds nothing large there: start fewer ranks on the host, or end what else runs there"
        )
    return (
        f"each rank of this run is planned with {format_bytes(copy_bytes)} there, a copy to write checkpoints from: "
        "checkpoint.asynchronous=false needs none"
    )


def _list_alternatives(config: Config, derived: Derived) -> Iterator[tuple[str, Config]]:
    """Yield the settings that may take less memory, each with the configuration that has it."""
    size, stage, buckets = config.train.micro_batch_size, config.zero.stage, config.zero.bucket_elements
    if size > 1:
        smaller = max(part for part in range(1, size // 2 + 1) if size % part == 0)
        train = dataclasses.replace(config.train, micro_batch_size=smaller)
        yield f"train.micro_batch_size={smaller}", dataclasses.replace(config, train=train)
    if config.model.recompute != "full":
        model = dataclasses.replace(config.model, recompute="full")
        yield "model.recompute=full", dataclasses.replace(config, model=model)
    if derived.data_parallel_size > 1:
        for higher in range(stage + 1, 4):
            zero = dataclasses.replace(config.zero, stage=higher)
            yield f"zero.stage={higher}", dataclasses.replace(config, zero=zero)
    if stage > 0 and buckets > 1_000_000:
        zero = dataclasses.replace(config.zero, bucket_elements=buckets // 10)
        yield f"zero.bucket_elements={buckets // 10}", dataclasses.replace(config, zero=zero)
