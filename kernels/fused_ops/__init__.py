"""The model's row operations on CUDA, by Triton kernels that pass over their tensors once each way.

The package can be used without megalibi: everything takes plain tensors and numbers. ``can_fuse`` says whether the
kernels take a tensor; where they do not, the caller computes the same in PyTorch.
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
