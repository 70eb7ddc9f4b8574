"""An estimate of a step's time before there is a GPU: each part takes its bytes or its FLOP at stated rates, if longer.

Bytes and FLOP of the forward and backward pass are those of the model's own code on the meta device (work_trace.py);
what comes after the gradient is counted by formulas. All times are estimates: nothing is measured, no part overlaps
another, and launching kernels costs nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from fused_ops import LAYER_NORM
from megalibi.config import Config, Derived, derive
from megalibi.errors import ConfigError
from megalibi.model import model_flops_per_token
from megalibi.plan.communication import make_group
from megalibi.plan.gpus import Gpu
from megalibi.plan.memory import build_on_meta, planning_for
from megalibi.plan.run_plan import RunPlan
from megalibi.plan.work_trace import ATTENTION, Work, WorkTrace, counting_by_part

ACCUMULATION, OPTIMIZER, COMMUNICATION = "gradient accumulation", "optimizer", "communication"
BYTES_OF_ADAMW, BYTES_OF_NESTEROV = 28, 20
"""Bytes of the optimizer for each fp32 weight: it reads the gradient, and reads and writes weight and moments."""
BYTES_OF_CLIPPING = 12
"""Bytes that clipping moves for each fp32 gradient: it reads it for the norm, and reads and writes it to scale it."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Shares of a data sheet's figures that a run reaches; the defaults are of one H200, results/gpu_h200_first."""

    matmul: float = 0.80
    """Share of the peak that 16-bit matrix products reach: 0.81 at 8192^3, 0.71 to 0.81 at the shapes of the 1.3B model
    (measured.json)."""
    attention: float = 0.35
    """Share of the peak that the fused attention kernel reaches on the FLOP of count_kernel: our Triton kernels at
    8 x 2,048 tokens (attention_b8.json). For longer text the horizon leaves keys out: 0.88 at 8,192 tokens."""
    memory: float = 0.85
    """Share of the memory's bandwidth: a copy reached 0.89 (measured.json)."""
    link: float = 0.70
    """Share of a link's bandwidth one way that collectives reach. It is an assumption: no two GPUs have run this."""

    def __post_init__(self) -> None:
        """Check that they are shares."""
        for name, share in dataclasses.asdict(self).items():
            if not 0 < share <= 1:
                raise ConfigError(f"--rates={name}={share:g}: must be a share above 0 and up to 1")


def parse_rates(text: str) -> Rates:
    """Read rates as in "matmul=0.8,memory=0.85"; rates that are not given keep their defaults.

    Raises:
        ConfigError: A name is not known, or a value is not a share.
    """
    names = [field.name for field in dataclasses.fields(Rates)]
    shares = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        try:
            shares[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(f"--rates={item}: must be a name and a number, as in matmul=0.8") from None
        if name.strip() not in names:
            raise ConfigError(f"--rates={item}: must name one of {', '.join(names)}")
    return Rates(**shares)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a micro batch of one rank; work that happens once a step is divided among its micro batches."""

    name: str
    """Name of the part: one of work_trace.py, or one of those after the gradient."""
    flops: float
    """FLOP of its matrix products."""
    bytes: float
    """Bytes that it reads and writes; for communication, bytes that the rank sends."""
    seconds: float
    """Seconds that the part is estimated to take."""
    bound_by: str
    """What takes the time: arithmetic, memory or link."""


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The estimate of a micro batch."""

    gpu: Gpu
    """The GPU whose figures are used."""
    rates: Rates
    """The shares of these figures that are assumed."""
    parts: list[Part]
    """The parts of a micro batch of a rank, the longest first."""
    tokens: int
    """Tokens of a micro batch, summed over the data ranks."""
    flops_causal: float
    """FLOP of the model for these tokens, attention counted causally (megalibi/model/size.py)."""
    flops_full: float
    """FLOP of the model for these tokens, attention counted in full."""
    ranks: int
    """The number of ranks of the job."""

    @property
    def seconds(self) -> float:
        """Estimated seconds of a micro batch."""
        return sum(part.seconds for part in self.parts)

    @property
    def tokens_per_second(self) -> float:
        """Estimated tokens a second of the whole job."""
        return self.tokens / self.seconds

    def mfu(self, *, causal: bool) -> float:
        """Return the estimated share of the peak that the model's arithmetic reaches, attention causal or in full."""
        flops = self.flops_causal if causal else self.flops_full
        return flops / self.seconds / self.ranks / self.gpu.peak_flops_per_second

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON, the totals beside the parts."""
        return {
            "what": "an estimate, not measured",
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "mfu_causal": self.mfu(causal=True),
            "mfu_full": self.mfu(causal=False),
            **dataclasses.asdict(self),
        }


def trace_work(config: Config, derived: Derived, *, attention: str = "fused") -> dict[str, Work]:
    """Return the work of the forward and backward pass of one micro batch on a rank, by part.

    Args:
        config: The configuration of the run.
        derived: What follows from it on its ranks.
        attention: "fused" or "unfused", as for plan_memory.
    """
    group = make_group(config.parallel.tensor_parallel_size)
    model = build_on_meta(config, derived, attention=attention, group=group)
    with torch.device("meta"):
        tokens_BS, labels_BS = (
            torch.empty(config.train.micro_batch_size, config.data.seq_length, dtype=torch.int64) for _ in range(2)
        )
    trace = WorkTrace()
    counting = counting_by_part(trace, model, kernel=attention == "fused")
    with planning_for(config.model, "cuda", LAYER_NORM), counting, trace:
        model(tokens_BS, labels_BS, micro_batch_key=0).sum().backward()
    return trace.parts


def count_after_gradients(config: Config, derived: Derived, parameters: int) -> dict[str, Work]:
    """Return the work on gradients and weights after the backward pass, as the share of one micro batch of a step.

    It counts one pass over what the arithmetic needs. DeepSpeed's own code may move more, as for a cast before a sum.

    Args:
        config: The configuration of the run.
        derived: What follows from it on its ranks.
        parameters: Parameters of the rank, before ZeRO shards them.
    """
    stage, is_low = config.zero.stage, config.train.precision != "fp32"
    cut = derived.data_parallel_size
    gradient = 2 if is_low and stage > 0 else 4
    summed = parameters * (gradient + 8)  # the gradient and the fp32 sum are read, and the sum is written
    if stage >= 2:  # the gradient goes into a bucket, and from there this rank's part into the sum
        summed = parameters * 2 * gradient + summed // cut
    of_weight = BYTES_OF_NESTEROV if config.optimizer.kind == "nesterov" else BYTES_OF_ADAMW
    of_weight += BYTES_OF_CLIPPING
    if is_low and stage > 0:
        of_weight += 6  # the new weight is read in fp32 and written in 16 bits
    step = parameters // (cut if stage > 0 else 1) * of_weight
    return {ACCUMULATION: Work(bytes=summed), OPTIMIZER: Work(bytes=step / derived.accumulation_steps)}


def check_estimate(config: Config, gpu: Gpu | None) -> None:
    """Check that the estimate has the figures that it needs.

    Raises:
        ConfigError: The speed of the GPU is not known, or the run is in fp32.
    """
    if gpu is None or not gpu.peak_flops_per_second:
        raise ConfigError("--roofline: must come with --gpu NAME, because no speed is known of a memory alone")
    if config.train.precision == "fp32":
        raise ConfigError("train.precision=fp32: must be bf16 or fp16 with --roofline, whose peaks are of these two")


def estimate(config: Config, plan: RunPlan, gpu: Gpu, rates: Rates) -> Roofline:
    """Return the estimate of a micro batch with its share of the optimizer's step.

    Args:
        config: The configuration of the run.
        plan: The plan of the run, from plan_run.
        gpu: The GPU of each rank.
        rates: Shares of its figures that are assumed.

    Raises:
        ConfigError: The speed of the GPU is not known, or the run is in fp32.
    """
    check_estimate(config, gpu)
    derived = derive(config, plan.ranks)
    work = trace_work(config, derived, attention=plan.attention)
    work |= count_after_gradients(config, derived, plan.parameters_per_rank)
    parts = [_time(name, done, gpu, rates) for name, done in work.items()]
    if plan.sent_bytes:
        sent = sum(plan.sent_bytes.values()) / derived.accumulation_steps
        seconds = sent / (rates.link * gpu.link_bytes_per_second)
        parts.append(Part(name=COMMUNICATION, flops=0.0, bytes=sent, seconds=seconds, bound_by="link"))
    tokens = config.train.micro_batch_size * config.data.seq_length * derived.data_parallel_size
    causal, full = (model_flops_per_token(config.model, config.data.seq_length, causal=c) for c in (True, False))
    return Roofline(
        gpu=gpu,
        rates=rates,
        parts=sorted(parts, key=lambda part: -part.seconds),
        tokens=tokens,
        flops_causal=causal * tokens,
        flops_full=full * tokens,
        ranks=plan.ranks,
    )


def _time(name: str, work: Work, gpu: Gpu, rates: Rates) -> Part:
    share = rates.attention if name == ATTENTION else rates.matmul
    computing = work.flops / (share * gpu.peak_flops_per_second)
    moving = work.bytes / (rates.memory * gpu.memory_bytes_per_second)
    return Part(
        name=name,
        flops=work.flops,
        bytes=work.bytes,
        seconds=max(computing, moving),
        bound_by="arithmetic" if computing >= moving else "memory",
    )
