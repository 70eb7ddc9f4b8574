"""What a run will take, before it has a GPU: parameters, arithmetic, memory, communication, the micro batch that fits.

Everything follows from the configuration and the number of ranks. Parameters, memory and communication are those of a
step on the meta device (plan_memory.py); arithmetic is counted by the formulas of megalibi/model/size.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megalibi.config import Config, Derived, derive
from megalibi.model import count_parameters, model_flops_per_token, recomputed_flops_per_token
from megalibi.plan.communication import sum_sent_bytes
from megalibi.plan.gpus import Gpu
from megalibi.plan.memory import TracedStep, trace_step
from megalibi.plan.memory_trace import MemoryByKind


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Floating point operations of an optimizer step, all ranks together, by three conventions."""

    full: float
    """Attention counted in full, queries x keys: Megatron-LM's (arXiv:2104.04473)."""
    causal: float
    """Attention counted causally: the keys that a query sees."""
    recomputed: float
    """``full``, and what activation checkpointing computes again: the hardware's."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will take."""

    ranks: int
    """Of the job."""
    data_parallel_size: int
    """Of them see different data."""
    accumulation_steps: int
    """Micro batches of a rank in a step."""
    attention: str
    """fused or unfused."""
    parameters: int
    """Of the whole model: a tied table once, the vocabulary without its padding."""
    parameters_per_rank: int
    """Of a tensor rank, padding included, before ZeRO cuts them."""
    batch_tokens: int
    """Tokens of a step."""
    flops: StepFlops
    """Arithmetic of a step."""
    memory: MemoryByKind
    """Of the first rank at the peak of a step."""
    sent_bytes: dict[str, int]
    """What the first rank sends in a step, by group and operation, by ring algorithms: (n - 1) / n of what is gathered
    or scattered among n ranks, and twice that of what is reduced on all."""
    gpu: Gpu | None
    """What the plan is held against."""
    fits: bool | None
    """Whether the memory does; None without a GPU."""
    largest_micro_batch: int | None
    """The largest that fits, among those that divide the samples of a data rank; 0 if none does, None without a GPU."""
    seconds_at_peak: float | None
    """What the arithmetic, ``recomputed``, takes if every GPU runs at its peak: no step is faster."""


def plan_memory(
    config: Config, derived: Derived, *, attention: str = "fused", device_type: str = "cuda"
) -> MemoryByKind:
    """Return what the first rank holds at the peak of a step.

    Args:
        config: The run.
        derived: What follows from it.
        attention: fused, a kernel with memory linear in the length, or unfused, which writes the scores out.
        device_type: Where it is to run: cuda or cpu.

    Raises:
        ConfigError: The kind of attention is not known.
    """
    return trace_step(config, derived, attention=attention, device_type=device_type).memory


def plan_run(
    config: Config, world_size: int, gpu: Gpu | None = None, attention: str = "fused", *, device_type: str = "cuda"
) -> RunPlan:
    """Return what a run will take.

    Args:
        config: The run.
        world_size: Ranks of the job.
        gpu: To find out what fits it.
        attention: As for plan_memory.
        device_type: As for plan_memory.

    Raises:
        ConfigError: The configuration does not fit the ranks, or the kind of attention is not known.
    """
    derived = derive(config, world_size)
    step = trace_step(config, derived, attention=attention, device_type=device_type)
    flops = _count_flops(config, derived)
    has_peak = gpu is not None and gpu.peak_flops_per_second > 0
    return RunPlan(
        ranks=world_size,
        data_parallel_size=derived.data_parallel_size,
        accumulation_steps=derived.accumulation_steps,
        attention=attention,
        parameters=count_parameters(config.model),
        parameters_per_rank=step.parameters,
        batch_tokens=derived.batch_tokens,
        flops=flops,
        memory=step.memory,
        sent_bytes=_sum_over_step(step, derived),
        gpu=gpu,
        fits=None if gpu is None else step.memory.total <= gpu.usable_bytes,
        largest_micro_batch=None if gpu is None else find_largest_micro_batch(config, world_size, gpu, attention),
        seconds_at_peak=flops.recomputed / world_size / gpu.peak_flops_per_second if gpu and has_peak else None,
    )


def _count_flops(config: Config, derived: Derived) -> StepFlops:
    model, seq_length = config.model, config.data.seq_length
    full, causal = (model_flops_per_token(model, seq_length, causal=causal) for causal in (False, True))
    again = recomputed_flops_per_token(model, seq_length)
    tokens = derived.batch_tokens
    return StepFlops(full=full * tokens, causal=causal * tokens, recomputed=(full + again) * tokens)


def _sum_over_step(step: TracedStep, derived: Derived) -> dict[str, int]:
    """Add up the last micro batch, the optimizer's step with it, and the others, which are alike."""
    totals = sum_sent_bytes(step.collectives["last"])
    for kind, sent in sum_sent_bytes(step.collectives.get("micro", ())).items():
        totals[kind] = totals.get(kind, 0) + sent * (derived.accumulation_steps - 1)
    return dict(sorted(totals.items()))


def find_largest_micro_batch(config: Config, world_size: int, gpu: Gpu, attention: str = "fused") -> int:
    """Return the largest micro batch whose memory fits, among those that divide a data rank's samples; 0: none does.

    Args:
        config: The run; its micro batch does not matter.
        world_size: Ranks of the job.
        gpu: Of each rank.
        attention: As for plan_memory.
    """
    smallest = _with_micro_batch(config, 1)
    samples = config.train.global_batch_size // derive(smallest, world_size).data_parallel_size
    sizes = [size for size in range(1, samples + 1) if samples % size == 0]

    def fits(size: int) -> bool:
        sized = _with_micro_batch(config, size)
        return plan_memory(sized, derive(sized, world_size), attention=attention).total <= gpu.usable_bytes

    return _last_that(sizes, fits)


def _last_that(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """Return the last size that fits, where those before it fit too; 0 if none does."""
    low, high = 0, len(sizes)  # as many fit at least, at most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(sizes[middle - 1]):
            low = middle
        else:
            high = middle - 1
    return sizes[low - 1] if low else 0


def _with_micro_batch(config: Config, size: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=size))
