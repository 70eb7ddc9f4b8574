"""A training step on the meta device: our model's own code and DeepSpeed's allocations, without a byte of either.

The same trace that measures a real step (memory_trace.py) sees it, so that every change of the model changes the plan.
The meta device runs no kernels: alibi_attention and fused_ops allocate there what their kernels would. Which tokens
fall into the bands of an adaptive softmax is taken from Zipf's law. Fused layer norms hold what PyTorch's hold, and are
planned as those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alibi_attention.backends.meta import standing_for
from fused_ops import CROSS_ENTROPY, fusing_on_meta
from megalibi.config import Config, Derived, ModelConfig, adaptive_bands
from megalibi.errors import ConfigError
from megalibi.model import DTYPES, GPT
from megalibi.parallel import Group, Layout
from megalibi.plan.communication import Collective, CollectiveLog, make_group
from megalibi.plan.deepspeed.stage_0 import Rank, Stage0, Stage1Bf16
from megalibi.plan.deepspeed.stage_1_and_2 import Stage1Or2
from megalibi.plan.deepspeed.stage_3 import Stage3
from megalibi.plan.memory_trace import MemoryByKind, MemoryTrace, tracing_model

ATTENTION_KINDS = ("fused", "unfused")


@dataclass(kw_only=True)
class TracedStep:
    """What one rank holds and sends in a training step."""

    parameters: int
    """Parameters of the rank, before ZeRO cuts them."""
    memory: MemoryByKind
    """Bytes that the rank holds when it holds most."""
    collectives: dict[str, list[Collective]] = field(default_factory=dict)
    """Communication of one micro batch, ``micro``, and of the last one with the optimizer's step, ``last``."""


def trace_step(config: Config, derived: Derived, *, attention: str = "fused", device_type: str = "cuda") -> TracedStep:
    """Run a step on the meta device, as the first rank of each group.

    Args:
        config: The run.
        derived: What follows from it.
        attention: fused for a kernel with memory linear in the length, or unfused, which writes the scores out.
        device_type: cpu or cuda, where the step is to run. On CUDA reductions run beside the backward pass, from a
            second bucket.

    Raises:
        ConfigError: The kind of attention is not known.
    """
    if attention not in ATTENTION_KINDS:
        raise ConfigError(f"--attention={attention}: must be one of {', '.join(ATTENTION_KINDS)}")
    tensor = make_group(config.parallel.tensor_parallel_size)
    data = make_group(derived.data_parallel_size)
    model = build_on_meta(config, derived, attention=attention, group=tensor)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trace = MemoryTrace(model.parameters())
    rank = Rank(config=config, model=model, data=data, trace=trace, overlap=device_type == "cuda")
    log = CollectiveLog(tensor=tensor, data=data)
    with ExitStack() as stack:
        for context in (planning_for(config.model, device_type), tracing_model(trace, model), trace, log):
            stack.enter_context(context)
        collectives = _run_step(rank, derived, log)
    return TracedStep(parameters=parameters, memory=trace.peak(), collectives=collectives)


def build_on_meta(config: Config, derived: Derived, *, attention: str, group: Group) -> GPT:
    """Return the model of a run on the meta device, as the first rank of each group has it.

    Args:
        config: The run.
        derived: What follows from it.
        attention: fused or unfused, whatever the run's own back end is.
        group: The tensor group.
    """
    # By name: of a choice by "auto" a line would be logged, which is no concern of who plans.
    backend = "unfused" if attention == "unfused" else "meta"
    with torch.device("meta"):
        return GPT(
            replace(config.model, attention_backend=backend),
            padded_vocab_size=derived.padded_vocab_size,
            layout=Layout(group, config.parallel.sequence_parallel),
            compute_dtype=DTYPES[config.train.precision],
        ).to(_parameter_dtype(config))


def _run_step(rank: Rank, derived: Derived, log: CollectiveLog) -> dict[str, list[Collective]]:
    """Run the last micro batch and, where there are several, one before it, which all others but the last are like."""
    stage = _build_stage(rank)
    for parameter in rank.model.parameters():
        parameter.register_post_accumulate_grad_hook(stage.take_gradient)
    by_phase: dict[str, list[Collective]] = {}
    shape = (rank.config.train.micro_batch_size, rank.config.data.seq_length)
    for phase in ("micro", "last")[derived.accumulation_steps == 1 :]:
        log.collectives = []
        is_last = phase == "last"
        stage.begin_micro_step(is_last)
        tokens_BS, labels_BS = (torch.empty(shape, dtype=torch.int64, device="meta") for _ in range(2))
        loss = rank.model(tokens_BS, labels_BS, micro_batch_key=0).sum()
        (loss * 1.0).backward()
        del loss
        stage.end_micro_step(is_last)
        if is_last:
            stage.step()
        by_phase[phase] = log.collectives
    return by_phase


def _parameter_dtype(config: Config) -> torch.dtype:
    """Return the dtype of the parameters: fp32 at stage 0, where they are the master weights."""
    return torch.float32 if config.zero.stage == 0 else DTYPES[config.train.precision]


def _build_stage(rank: Rank) -> Stage0:
    stage, precision = rank.config.zero.stage, rank.config.train.precision
    if stage == 1 and precision == "bf16":
        return Stage1Bf16(rank)
    return (Stage0, Stage1Or2, Stage1Or2, Stage3)[stage](rank)


@contextmanager
def planning_for(model: ModelConfig, device_type: str, *kernels: str) -> Iterator[None]:
    """Let the meta device stand for another one, for a while.

    Args:
        model: The network.
        device_type: cpu or cuda.
        kernels: Names of kernels of fused_ops that run on CUDA beside that of cross entropy.
    """
    fused = (CROSS_ENTROPY, *kernels) if device_type == "cuda" else ()
    with standing_for(device_type), fusing_on_meta(*fused), _TokensOfBands(model):
        yield


class _TokensOfBands(TorchDispatchMode):
    """Says which tokens belong to a later band of an adaptive softmax: as many as Zipf's law puts there."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        shares = [math.log(band.stop / band.start) / math.log(model.vocab_size)
                  for band in (adaptive_bands(model)[1:] if model.adaptive_cutoffs else ())]  # fmt: skip
        self._shares = cycle(shares or [1.0])

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return as many indices as Zipf's law asks for, or run the operation."""
        if function is torch.ops.aten.nonzero.default and args[0].device.type == "meta":
            count = math.ceil(next(self._shares) * args[0].numel())
            return torch.empty(count, args[0].dim(), dtype=torch.int64, device="meta")
        return function(*args, **(kwargs or {}))
