"""What a run will need, before it has a GPU: parameters, arithmetic, memory, communication, the micro batch that fits.

Everything follows from the configuration and the number of ranks. Parameters, memory and communication are those of a
step on the meta device (memory.py); arithmetic is counted by the formulas of megalibi/model/size.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megalibi.checkpoint import ELEMENT_BYTES
from megalibi.config import Config, Derived, derive
from megalibi.engine.masters import STATES
from megalibi.log import get_logger
from megalibi.model import count_parameters, model_flops_per_token, recomputed_flops_per_token
from megalibi.plan.communication import sum_sent_bytes
from megalibi.plan.deepspeed.version import describe_other_version
from megalibi.plan.gpus import Gpu
from megalibi.plan.memory import TracedStep, trace_step
from megalibi.plan.memory_trace import MemoryByKind

_LOGGER = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Floating point operations of an optimizer step on all ranks together, by three conventions."""

    full: float
    """Attention counts in full, queries x keys, as in Megatron-LM (arXiv:2104.04473)."""
    causal: float
    """Attention counts causally: only the keys that a query sees."""
    recomputed: float
    """``full`` and what activation checkpointing computes again: the arithmetic that the hardware does."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will need."""

    ranks: int
    """The number of ranks of the job."""
    data_parallel_size: int
    """Ranks that see different data."""
    accumulation_steps: int
    """Micro batches of a rank in an optimizer step."""
    attention: str
    """The kind of attention: fused or unfused."""
    parameters: int
    """Parameters of the whole model: a tied table counts once, and the padding of the vocabulary does not."""
    parameters_per_rank: int
    """Parameters of a tensor rank, padding included, before ZeRO shards them."""
    batch_tokens: int
    """Tokens of an optimizer step."""
    flops: StepFlops
    """Arithmetic of an optimizer step."""
    memory: MemoryByKind
    """Bytes that the first rank holds at the peak of a step."""
    snapshot_bytes: int
    """Bytes of host memory of a rank beside ``memory``: the copy from which checkpoints are written in the background;
    0 with checkpoint.asynchronous=false, and where the only checkpoint is that of the last step."""
    sent_bytes: dict[str, int]
    """Bytes that the first rank sends in a step, by group and operation. Rings of n ranks send (n - 1) / n of a tensor
    that is gathered or scattered, and twice that of one that is reduced on all ranks."""
    gpu: Gpu | None
    """The GPU that the plan is compared with, if one is given."""
    fits: bool | None
    """Whether the memory fits the GPU; None without a GPU."""
    largest_micro_batch: int | None
    """The largest micro batch that fits, among those that divide the samples of a data rank; 0 if none does, None
    without a GPU."""
    seconds_at_peak: float | None
    """Seconds of ``flops.recomputed`` with every GPU at its peak: no step is faster. None without a GPU."""
    replay_note: str | None = None
    """One line that says so if another version of DeepSpeed is installed than the one that is replayed."""


def plan_memory(
    config: Config, derived: Derived, *, attention: str = "fused", device_type: str = "cuda"
) -> MemoryByKind:
    """Return what the first rank holds at the peak of a step.

    Args:
        config: The configuration of the run.
        derived: What follows from it on its ranks.
        attention: "fused" for a kernel whose memory is linear in the length, or "unfused" for attention that writes
            its scores to memory.
        device_type: Where the run computes: cuda or cpu.

    Raises:
        ConfigError: The kind of attention is not known.
    """
    return trace_step(config, derived, attention=attention, device_type=device_type).memory


def plan_run(
    config: Config,
    world_size: int,
    gpu: Gpu | None = None,
    attention: str = "fused",
    *,
    device_type: str = "cuda",
    deepspeed_version: str | None = None,
) -> RunPlan:
    """Return what a run will need, and log a warning if the plan replays another DeepSpeed than the installed one.

    Args:
        config: The configuration of the run.
        world_size: Ranks of the job.
        gpu: The GPU of each rank, to find out what fits it.
        attention: "fused" or "unfused", as for plan_memory.
        device_type: Where the run computes: cuda or cpu.
        deepspeed_version: The version that will run the training; None means the one that is installed here.

    Raises:
        ConfigError: The configuration does not fit the ranks, or the kind of attention is not known.
    """
    derived = derive(config, world_size)
    step = trace_step(config, derived, attention=attention, device_type=device_type)
    flops = _count_flops(config, derived)
    replay_note = describe_other_version(deepspeed_version)
    if replay_note is not None:
        _LOGGER.warning("%s", replay_note)
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
        snapshot_bytes=plan_snapshot_bytes(config, derived, step.parameters),
        sent_bytes=_sum_over_step(step, derived),
        gpu=gpu,
        fits=None if gpu is None else step.memory.total <= gpu.usable_bytes,
        largest_micro_batch=None if gpu is None else find_largest_micro_batch(config, world_size, gpu, attention),
        seconds_at_peak=flops.recomputed / world_size / gpu.peak_flops_per_second if gpu and has_peak else None,
        replay_note=replay_note,
    )


def plan_snapshot_bytes(config: Config, derived: Derived, parameters: int) -> int:
    """Return how much host memory a rank's copy takes from which checkpoints are written, or 0 if there is none.

    It is the rank's share of the fp32 weights and of the optimizer's states, at every stage of ZeRO: at ZeRO 0 the data
    ranks share the writing. Ranks differ by the few elements that do not divide.

    Args:
        config: The configuration of the run.
        derived: What follows from it on its ranks.
        parameters: Parameters of a tensor rank, padding included.
    """
    every_save_waits = not 0 < config.checkpoint.every_steps < config.train.steps  # for the last step's is waited for
    if config.checkpoint.asynchronous is False or every_save_waits:
        return 0
    copies = 1 + len(STATES[config.optimizer.kind])
    return ELEMENT_BYTES * copies * math.ceil(parameters / derived.data_parallel_size)


def _count_flops(config: Config, derived: Derived) -> StepFlops:
    model, seq_length = config.model, config.data.seq_length
    full, causal = (model_flops_per_token(model, seq_length, causal=causal) for causal in (False, True))
    again = recomputed_flops_per_token(model, seq_length)
    tokens = derived.batch_tokens
    return StepFlops(full=full * tokens, causal=causal * tokens, recomputed=(full + again) * tokens)


def _sum_over_step(step: TracedStep, derived: Derived) -> dict[str, int]:
    """Add up the last micro batch, which includes the optimizer's step, and the others, which are all alike."""
    totals = sum_sent_bytes(step.collectives["last"])
    for kind, sent in sum_sent_bytes(step.collectives.get("micro", ())).items():
        totals[kind] = totals.get(kind, 0) + sent * (derived.accumulation_steps - 1)
    return dict(sorted(totals.items()))


def find_largest_micro_batch(config: Config, world_size: int, gpu: Gpu, attention: str = "fused") -> int:
    """Return the largest micro batch that fits, among those that divide a data rank's samples; 0 if none fits.

    Args:
        config: The configuration of the run; its micro batch does not matter.
        world_size: Ranks of the job.
        gpu: The GPU of each rank.
        attention: "fused" or "unfused", as for plan_memory.
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
    low, high = 0, len(sizes)  # at least ``low`` sizes fit, and at most ``high``
    while low < high:
        middle = (low + high + 1) // 2
        if fits(sizes[middle - 1]):
            low = middle
        else:
            high = middle - 1
    return sizes[low - 1] if low else 0


def _with_micro_batch(config: Config, size: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=size))
