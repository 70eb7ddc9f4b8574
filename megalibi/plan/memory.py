"""A training step on the meta device: our model's own code and DeepSpeed's allocations, without a byte of either.

The same trace that measures a real step (memory.py) sees it, so every change of the model changes the plan. Four
things have no meta form and are stood in for: a fused attention kernel, which is known by what it keeps; the kernels of
cross entropy, where CUDA has them; the masks of dropout; and which tokens fall into the bands of an adaptive softmax,
for which Zipf's law is taken. Fused layer norms hold what PyTorch's hold, and are planned as those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megalibi.config import Config, Derived, ModelConfig, adaptive_bands
from megalibi.engine.build import DTYPES
from megalibi.errors import ConfigError
from megalibi.model import GPT
from megalibi.model import attention as model_attention
from megalibi.parallel import cross_entropy as parallel_cross_entropy
from megalibi.parallel import random as parallel_random
from megalibi.plan.communication import Collective, CollectiveLog, make_group
from megalibi.plan.deepspeed.stage_0 import Rank, Stage0, Stage1Bf16
from megalibi.plan.deepspeed.stage_1_and_2 import Stage1Or2
from megalibi.plan.deepspeed.stage_3 import Stage3
from megalibi.plan.memory_trace import MemoryByKind, MemoryTrace, tracing_model

ATTENTION_KINDS = ("fused", "unfused")
QUERIES_WRITTEN_OUT = 256
"""Of alibi_attention's sdpa, where the bias is learned."""
ROWS_KEPT = 2
"""fp32 numbers that a fused kernel keeps for each query and head: its largest score and its sum."""
_ATTENTION = model_attention.attention  # without a stand-in


@dataclass(kw_only=True)
class TracedStep:
    """What a step holds and sends."""

    parameters: int
    """Of the rank, before ZeRO cuts them."""
    memory: MemoryByKind
    """At its peak."""
    collectives: dict[str, list[Collective]] = field(default_factory=dict)
    """Of a micro batch, ``micro``, and of the last one with the optimizer's step, ``last``."""


def trace_step(config: Config, derived: Derived, *, attention: str = "fused", device_type: str = "cuda") -> TracedStep:
    """Run a step on the meta device, as the first rank of each group.

    Args:
        config: The run.
        derived: What follows from it.
        attention: fused, a kernel with memory linear in the length, or unfused, which writes the scores out.
        device_type: Where it is to run: on CUDA reductions run beside the backward pass, from a second bucket.

    Raises:
        ConfigError: The kind of attention is not known.
    """
    if attention not in ATTENTION_KINDS:
        raise ConfigError(f"attention={attention} is not allowed: one of {', '.join(ATTENTION_KINDS)} is")
    tensor = make_group(config.parallel.tensor_parallel_size)
    data = make_group(derived.data_parallel_size)
    with torch.device("meta"):
        model = GPT(
            config.model,
            padded_vocab_size=derived.padded_vocab_size,
            group=tensor,
            sequence_parallel=config.parallel.sequence_parallel,
            compute_dtype=DTYPES[config.train.precision],
        ).to(_parameter_dtype(config))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trace = MemoryTrace(model.parameters())
    rank = Rank(config=config, model=model, data=data, trace=trace, overlap=device_type == "cuda")
    log = CollectiveLog(tensor=tensor, data=data)
    with ExitStack() as stack:
        for context in (stand_ins(config.model, attention, device_type), tracing_model(trace, model), trace, log):
            stack.enter_context(context)
        collectives = _run_step(rank, derived, log)
    return TracedStep(parameters=parameters, memory=trace.peak(), collectives=collectives)


def _run_step(rank: Rank, derived: Derived, log: CollectiveLog) -> dict[str, list[Collective]]:
    """Run the last micro batch and, where there are several, one before it: those between are like that one."""
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
def stand_ins(model: ModelConfig, attention: str, device_type: str) -> Iterator[None]:
    """Put what the meta device has no form of in its place for a while."""
    attend: Callable[..., Tensor] = partial(_attend_fused, device_type=device_type)
    if attention == "unfused":
        attend = _attend_unfused
    with (
        patch.object(model_attention, "attention", attend),
        patch.object(parallel_cross_entropy, "can_fuse", lambda _: device_type == "cuda"),
        patch.object(parallel_cross_entropy, "reduce_rows", _reduce_rows),
        patch.object(parallel_cross_entropy, "find_gradient", _find_gradient),
        patch.object(parallel_random, "_drop", _drop),
        _TokensOfBands(model),
    ):
        yield


def _attend_unfused(*qkv: Tensor, backend: str, **arguments: Any) -> Tensor:
    """Call the back end of that name whatever the model's is: it runs on the meta device too."""
    return _ATTENTION(*qkv, backend="unfused", **arguments)


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, *, alibi_slopes: Any, distance_bias: Any, device_type: str,
                  **_: Any) -> Tensor:  # fmt: skip
    """Stand in for a kernel. A learned bias has none: alibi_attention's sdpa writes a few queries out at a time."""
    if distance_bias is None:
        ours = alibi_slopes is not None or device_type == "cpu"  # on CUDA others come first where there is no bias
        return _Fused.apply(q, k, v, ours)
    x_BSHK = tuple(x.float() if device_type == "cuda" else x for x in (q, k, v))
    starts = range(0, q.shape[1], QUERIES_WRITTEN_OUT)

    def attend(q_BQHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        mask_HQT = distance_bias[:, : k_BTHK.shape[1]].unsqueeze(1).expand(-1, q_BQHK.shape[1], -1)
        q_BHQK, k_BHTK, v_BHTK = (x.transpose(1, 2) for x in (q_BQHK.flip(1), k_BTHK, v_BTHK))
        with sdpa_kernel(SDPBackend.MATH):
            mask_BHQT = mask_HQT.unsqueeze(0).to(q_BHQK.dtype)
            return F.scaled_dot_product_attention(q_BHQK, k_BHTK, v_BHTK, attn_mask=mask_BHQT).transpose(1, 2).flip(1)

    outputs = []
    for start in starts:
        stop = start + QUERIES_WRITTEN_OUT
        block = (x_BSHK[0][:, start:stop], x_BSHK[1][:, :stop], x_BSHK[2][:, :stop])
        outputs.append(attend(*block) if len(starts) == 1 else checkpoint(attend, *block, use_reentrant=False))
    return torch.cat(outputs, dim=1).to(q.dtype)


class _Fused(Function):
    """A kernel that keeps its inputs, its output and a few numbers for each query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ours: bool) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        rows = [torch.empty(q.shape[:3], device=q.device) for _ in range(ROWS_KEPT)]
        ctx.save_for_backward(q, k, v, out, *rows)
        # Our kernels write into one tensor if q, k and v are parts of one, as they are unless a method acts on q and k.
        ctx.in_one = ours and k.storage_offset() > 0
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, *_ = ctx.saved_tensors
        if ctx.in_one:
            parts = torch.empty((*q.shape[:2], 3, *q.shape[2:]), dtype=q.dtype, device=q.device)
            return *parts.unbind(2), None
        return *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in ctx.saved_tensors[:3]), None


def _reduce_rows(logits_NV: Tensor, labels_N: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Make what the kernel of fused_ops makes."""
    largest_N, sum_N, label_logit_N = (torch.empty(labels_N.shape, device=logits_NV.device) for _ in range(3))
    return largest_N, sum_N, label_logit_N


def _find_gradient(logits_NV: Tensor, *_: Tensor, overwrite: bool, **__: Any) -> Tensor:
    """Make what the kernel of fused_ops makes, if anything."""
    return logits_NV.detach() if overwrite else torch.empty_like(logits_NV)


def _drop(x: Tensor, p: float, key: int) -> Tensor:
    """Make what dropout makes: a mask and the result."""
    return (x / (1.0 - p)).masked_fill_(torch.empty(x.shape, dtype=torch.bool, device=x.device), 0.0)


class _TokensOfBands(TorchDispatchMode):
    """Answers which tokens are of a later band of an adaptive softmax: as many as Zipf's law has there."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        shares = [math.log(band.stop / band.start) / math.log(model.vocab_size)
                  for band in (adaptive_bands(model)[1:] if model.adaptive_cutoffs else ())]  # fmt: skip
        self._shares = cycle(shares or [1.0])

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer, or run the operation."""
        if function is torch.ops.aten.nonzero.default and args[0].device.type == "meta":
            count = math.ceil(next(self._shares) * args[0].numel())
            return torch.empty(count, args[0].dim(), dtype=torch.int64, device="meta")
        return function(*args, **(kwargs or {}))
