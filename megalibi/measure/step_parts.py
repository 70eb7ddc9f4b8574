"""The parts of a training step, and the part that a kernel belongs to.

A kernel is recognised by its name, or by what was running on the host when it was launched: an operation of PyTorch, a
node of autograd, the step of the optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MATMUL, ATTENTION, CROSS_ENTROPY, LAYER_NORM = "matmul", "attention", "cross entropy", "layer norm"
GELU, RESIDUAL, OPTIMIZER = "GELU", "residual", "optimizer"
ACCUMULATION, COMMUNICATION, OTHER = "gradient accumulation", "communication", "other"
PARTS = (
    MATMUL, ATTENTION, CROSS_ENTROPY, LAYER_NORM, GELU, RESIDUAL, OPTIMIZER, ACCUMULATION, COMMUNICATION, OTHER
)  # fmt: skip
FORWARD_RANGE, BACKWARD_RANGE, STEP_RANGE = "megalibi: forward", "megalibi: backward", "megalibi: step"
"""Names that step_profile.py gives to the three calls of the engine."""

# The order matters: names of attention kernels contain the name of the matrix library that they are built on.
_BY_NAME = (
    (COMMUNICATION, r"nccl|gloo|c10d::|all_?reduce|all_?gather|reduce_?scatter"),
    (CROSS_ENTROPY, r"cross_?entropy"),
    (LAYER_NORM, r"layer_?norm|GammaBeta"),
    (GELU, r"gelu"),
    (ATTENTION, r"flash_|fmha|scaled_dot_product|attention|^(forward|query_gradient|key_gradient|key_norms)_kernel"),
    (MATMUL, r"nvjet|gemm|cublas|cutlass|^aten::(mm|addmm|bmm)$|mkldnn_linear"),
    (OPTIMIZER, r"FusedOptimizer|_fused_adam|FusedAdam"),
)
# These patterns are for what runs around a kernel on the host. Casts beside a matrix product count with the product.
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
        name: Name of the kernel or operation.
        path: What was running on the host, innermost first; empty if that is not known.
    """
    part = _match(_BY_NAME, name)
    if part is not None:
        return part
    operation = path[0] if path and path[0].startswith("aten::") else name
    around = path[1:] if operation != name else path
    # Autograd adds the two gradients of a tensor that was used twice: such tensors are those of the residual stream.
    if operation in _ADDITIONS and around and around[0].startswith(_AUTOGRAD_NODE) and "Accumulate" not in around[0]:
        return RESIDUAL
    for place in (name, *path):
        part = _match(_BY_PATH, place)
        if part is not None:
            return part
    if operation in _ADDITIONS:
        return RESIDUAL
    in_backward = BACKWARD_RANGE in path and not any(place.startswith(_AUTOGRAD_NODE) for place in (name, *path))
    return ACCUMULATION if in_backward else OTHER  # DeepSpeed's work on the gradients once all are there


def _match(rules: Sequence[tuple[str, str]], name: str) -> str | None:
    return next((part for part, pattern in rules if re.search(pattern, name, re.IGNORECASE)), None)
