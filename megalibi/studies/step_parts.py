"""The parts of a training step: which part a kernel belongs to, and what each part has to compute and to move.

A kernel is known by its name, or by what was running on the host when it was launched: an operation of PyTorch, a node
of autograd, the step of the optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megalibi.config import Config, Derived
from megalibi.model import count_parameters, model_flops_per_token

MATMUL, ATTENTION, CROSS_ENTROPY, LAYER_NORM = "matmul", "attention", "cross entropy", "layer norm"
GELU, RESIDUAL, OPTIMIZER = "GELU", "residual", "optimizer"
ACCUMULATION, COMMUNICATION, OTHER = "gradient accumulation", "communication", "other"
PARTS = (
    MATMUL, ATTENTION, CROSS_ENTROPY, LAYER_NORM, GELU, RESIDUAL, OPTIMIZER, ACCUMULATION, COMMUNICATION, OTHER
)  # fmt: skip
FORWARD_RANGE, BACKWARD_RANGE, STEP_RANGE = "megalibi: forward", "megalibi: backward", "megalibi: step"
"""What step_profile.py calls the three calls of the engine."""

# In this order: the names of attention kernels hold those of the matrix library they are built on.
_BY_NAME = (
    (COMMUNICATION, r"nccl|gloo|c10d::|all_?reduce|all_?gather|reduce_?scatter"),
    (CROSS_ENTROPY, r"cross_?entropy"),
    (LAYER_NORM, r"layer_?norm|GammaBeta"),
    (GELU, r"gelu"),
    (ATTENTION, r"flash_|fmha|scaled_dot_product|attention|^(forward|query_gradient|key_gradient|key_norms)_kernel"),
    (MATMUL, r"nvjet|gemm|cublas|cutlass|^aten::(mm|addmm|bmm)$|mkldnn_linear"),
    (OPTIMIZER, r"FusedOptimizer|_fused_adam|FusedAdam"),
)
# The same for what stands around a kernel on the host. Casts beside a matrix product count with it.
_BY_PATH = (
    *((part, pattern) for part, pattern in _BY_NAME if part != COMMUNICATION),
    (ATTENTION, r"_Windows|AttendInParts"),
    (ACCUMULATION, r"AccumulateGrad"),
    (OPTIMIZER, rf"^Optimizer\.|{STEP_RANGE}"),
    (MATMUL, r"aten::linear|LinearBackward|MmBackward|_LinearInTensorGroup"),
)
_AUTOGRAD_NODE = "autograd::engine::evaluate_function"
_ADDITIONS = ("aten::add", "aten::add_")


def find_part(name: str, path: Sequence[str] = ()) -> str:
    """Return the part that a kernel, or on a CPU an operation, belongs to.

    Args:
        name: Of the kernel or operation.
        path: What was running on the host, innermost first; empty: it is not known.
    """
    part = _match(_BY_NAME, name)
    if part is not None:
        return part
    operation = path[0] if path and path[0].startswith("aten::") else name
    around = path[1:] if operation != name else path
    # Autograd adds the gradients of a tensor that was used twice, which are those of the residual stream.
    if operation in _ADDITIONS and around and around[0].startswith(_AUTOGRAD_NODE) and "Accumulate" not in around[0]:
        return RESIDUAL
    for place in (name, *path):
        part = _match(_BY_PATH, place)
        if part is not None:
            return part
    if operation in _ADDITIONS:
        return RESIDUAL
    in_backward = BACKWARD_RANGE in path and not any(place.startswith(_AUTOGRAD_NODE) for place in (name, *path))
    return ACCUMULATION if in_backward else OTHER  # what DeepSpeed does with the gradients when all are there


def _match(rules: Sequence[tuple[str, str]], name: str) -> str | None:
    return next((part for part, pattern in rules if re.search(pattern, name, re.IGNORECASE)), None)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a part of an optimizer step has to do on one rank, at the least."""

    flops: float = 0.0
    """In matrix products; attention's as the causal mask leaves them."""
    moved_bytes: float = 0.0
    """Read and written if every tensor passes once each way; 0 of matrix products, which are bound otherwise."""


def count_work(config: Config, derived: Derived) -> dict[str, Work]:
    """Return the work of each part that has some, on each rank of a run; recomputation is not counted.

    A lower bound by formulas, for a step whose kernels do each thing in one pass. h hidden size, f feed-forward size, L
    layers, V padded vocabulary, T tokens of a rank, P parameters of a rank, b bytes of an activation:

    - layer norm: 2 T h b forward, 3 T h b backward, 2 L + 1 times
    - residual: 3 T h b each way, 2 L times; GELU: 2 T f b and 3 T f b, L times
    - cross entropy: T V b forward, 2 T V b backward; attention: 4 T h b and 8 T h b, L times
    - gradient accumulation, of each micro batch: the gradient read, its fp32 sum read and written
    - optimizer: fp32 weight and both moments read and written, gradient read, weight in 16 bits written; ZeRO cuts it

    Args:
        config: The run.
        derived: What follows from it.
    """
    model, length, ranks = config.model, config.data.seq_length, config.parallel.tensor_parallel_size
    tokens = derived.batch_tokens / derived.data_parallel_size
    size = 4 if config.train.precision == "fp32" else 2
    parameters = count_parameters(model, derived.padded_vocab_size) / ranks
    layers, stream = model.num_layers, tokens * model.hidden_size * size
    # Attention is proportional to the keys, the other products do not depend on them.
    causal = model_flops_per_token(model, length, causal=True)
    of_one_key = model_flops_per_token(model, 1, causal=False) - model_flops_per_token(model, 0, causal=False)
    attention = of_one_key * (length + 1) / 2
    shared = derived.data_parallel_size if config.zero.stage > 0 else 1
    return {
        MATMUL: Work(flops=tokens * (causal - attention) / ranks),
        ATTENTION: Work(flops=tokens * attention / ranks, moved_bytes=12 * stream * layers / ranks),
        CROSS_ENTROPY: Work(moved_bytes=3 * tokens * derived.padded_vocab_size * size / ranks),
        LAYER_NORM: Work(moved_bytes=5 * stream * (2 * layers + 1)),
        GELU: Work(moved_bytes=5 * tokens * model.ffn_hidden_size * size * layers / ranks),
        RESIDUAL: Work(moved_bytes=6 * stream * 2 * layers),
        ACCUMULATION: Work(moved_bytes=(size + 8) * parameters * derived.accumulation_steps),
        OPTIMIZER: Work(moved_bytes=(28 + size % 4) * parameters / shared),
    }
