"""The model's row operations in one pass each way over their tensors, by Triton kernels: for CUDA.

Usable without megalibi. Everything takes plain tensors and numbers. ``can_fuse`` says whether a tensor can be given to
the rest; where it cannot, the caller computes the same in PyTorch.
"""

from __future__ import annotations

from fused_ops.availability import CROSS_ENTROPY, LAYER_NORM, can_fuse, fusing, fusing_on_meta
from fused_ops.cross_entropy import find_gradient, reduce_rows
from fused_ops.layer_norm import add_layer_norm, can_fuse_layer_norm

__all__ = [
    "CROSS_ENTROPY",
    "LAYER_NORM",
    "add_layer_norm",
    "can_fuse",
    "can_fuse_layer_norm",
    "find_gradient",
    "fusing",
    "fusing_on_meta",
    "reduce_rows",
]
