"""Shapes alone, for tensors on the meta device: what a fused kernel allocates and keeps, so that a run can be planned.

What is allocated depends on the device, and a meta tensor does not say which one it stands for: ``standing_for`` says
so, and without it that is CUDA.

Shape suffixes: B batch, S sequence, H heads, K head dimension, Q queries of a block, T keys it is shown, D distances.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from alibi_attention.backend import AttentionInputs, Capability
from alibi_attention.backends.sdpa import MIN_BLOCK_QUERIES
from alibi_attention.packed import empty_gradients

NAME = "meta"

_ROWS_KEPT = 2  # fp32 numbers of each query and head: its largest score and its sum

_device_type: ContextVar[str] = ContextVar("alibi_attention.meta", default="cuda")


@contextmanager
def standing_for(device_type: str) -> Iterator[None]:
    """Let the meta device stand for another one, for a while.

    Args:
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: It is another type of device.
    """
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"device_type={device_type!r}: must be cpu or cuda")
    token = _device_type.set(device_type)
    try:
        yield
    finally:
        _device_type.reset(token)


def capability() -> Capability:
    """Return what this back end can do: the shapes of every call."""
    return Capability(
        name=NAME,
        usable=True,
        reason="",
        exactness="computes shapes alone, to plan what a fused kernel allocates",
        devices=("meta",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        dropout=True,
        cu_seqlens="shapes do not depend on them",
        distance_bias=True,
    )


def attend(inputs: AttentionInputs) -> torch.Tensor:
    """Return an empty output, and keep for the backward pass what a fused kernel keeps."""
    device_type = _device_type.get()
    if inputs.distance_bias is not None:
        return _attend_with_distance_bias(*inputs.qkv, inputs.distance_bias, device_type)
    # On CUDA kernels that others have tuned come first where there is no bias (attention.py).
    is_ours = inputs.alibi_slopes is not None or device_type == "cpu"
    output_BSHK: torch.Tensor = _Fused.apply(*inputs.qkv, is_ours)
    return output_BSHK


class _Fused(torch.autograd.Function):
    """A kernel that keeps its inputs, its output and a few numbers of each query."""

    @staticmethod
    def forward(
        ctx: Any, q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor, is_ours: bool
    ) -> torch.Tensor:
        output_BSHK = torch.empty(q_BSHK.shape, dtype=q_BSHK.dtype, device=q_BSHK.device)
        rows_BSH = [torch.empty(q_BSHK.shape[:3], device=q_BSHK.device) for _ in range(_ROWS_KEPT)]
        ctx.save_for_backward(q_BSHK, k_BSHK, v_BSHK, output_BSHK, *rows_BSH)
        ctx.is_ours = is_ours
        return output_BSHK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BSHK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        qkv = ctx.saved_tensors[:3]
        if ctx.is_ours:
            return *empty_gradients(*qkv), None
        return *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in qkv), None


def _attend_with_distance_bias(
    q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor, bias_HD: torch.Tensor, device_type: str
) -> torch.Tensor:
    """Go the way of sdpa.py, which writes out the weights of a few queries at a time and makes them anew later."""
    dtype = q_BSHK.dtype
    if device_type == "cuda":
        q_BSHK, k_BSHK, v_BSHK = (x.float() for x in (q_BSHK, k_BSHK, v_BSHK))

    def attend_block(q_BQHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHK: torch.Tensor) -> torch.Tensor:
        mask_HQT = bias_HD[:, : k_BTHK.shape[1]].unsqueeze(1).expand(-1, q_BQHK.shape[1], -1)
        q_BHQK, k_BHTK, v_BHTK = (x.transpose(1, 2) for x in (q_BQHK.flip(1), k_BTHK, v_BTHK))
        with sdpa_kernel(SDPBackend.MATH):
            mask_BHQT = mask_HQT.unsqueeze(0).to(q_BHQK.dtype)
            return F.scaled_dot_product_attention(q_BHQK, k_BHTK, v_BHTK, attn_mask=mask_BHQT).transpose(1, 2).flip(1)

    starts = range(0, q_BSHK.shape[1], MIN_BLOCK_QUERIES)
    outputs = []
    for start in starts:
        stop = start + MIN_BLOCK_QUERIES
        block = (q_BSHK[:, start:stop], k_BSHK[:, :stop], v_BSHK[:, :stop])
        outputs.append(
            attend_block(*block) if len(starts) == 1 else checkpoint(attend_block, *block, use_reentrant=False)
        )
    return torch.cat(outputs, dim=1).to(dtype)
