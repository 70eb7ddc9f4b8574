"""Our Triton kernels: the bias from the fp32 slope in registers, and no visit to keys past a head's horizon.

forward.py has the horizon, backward.py the gradients. Memory is linear in S. On a CPU the kernels run in Triton's
interpreter if the environment had TRITON_INTERPRET=1 when this was imported: for tests, and by name only.

Shape suffixes: B batch, S sequence, H heads, K head dimension, N blocks; G groups, the heads of all sequences of the
batch, or the heads alone if documents are packed.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch

from alibi_attention.backend import AttentionInputs, Capability
from alibi_attention.backends.triton.geometry import Documents, Geometry, make_geometry
from alibi_attention.backends.triton.launch import Launch
from alibi_attention.documents import PackedDocuments
from alibi_attention.packed import empty_gradients

try:
    from alibi_attention.backends.triton import backward as triton_backward
    from alibi_attention.backends.triton import forward as triton_forward
    from alibi_attention.backends.triton import tiles as triton_tiles
except ImportError as error:
    _IMPORT_FAULT = f"its kernels cannot be imported: {error}"
else:
    _IMPORT_FAULT = ""

NAME = "triton"

_MAX_HEAD_DIM = 256
# With fewer blocks of keys none can be left out: the block before the diagonal is always too near.
_MIN_HORIZON_BLOCKS = 3
# Number of shapes whose launches are kept. A training has a few, and a few dozen where documents are packed.
_MAX_SHAPES = 512


def capability() -> Capability:
    """Return what this back end can do."""
    interpreted = not _IMPORT_FAULT and triton_tiles.INTERPRETED
    return Capability(
        name=NAME,
        usable=not _IMPORT_FAULT,
        reason=_IMPORT_FAULT,
        exactness="bias, softmax and sums in fp32, weights rounded to the type of v; memory linear in S",
        devices=("cuda", "cpu") if interpreted else ("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        dropout=False,
        cu_seqlens="native",
        horizon=True,
        max_head_dim=_MAX_HEAD_DIM,
        auto=not interpreted,
    )


def attend(inputs: AttentionInputs) -> torch.Tensor:
    """Attend causally, to the keys within each head's horizon."""
    documents, constants = inputs.documents, (inputs.softmax_scale, inputs.query_offset, inputs.horizon_eps)
    if documents is None:
        return _Attention.apply(*inputs.qkv, inputs.alibi_slopes, None, *constants)
    qkv = (x.flatten(0, 1).unsqueeze(0) for x in inputs.qkv)
    return _Attention.apply(*qkv, inputs.alibi_slopes, documents, *constants).view_as(inputs.q)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BSHK: torch.Tensor,
        k_BSHK: torch.Tensor,
        v_BSHK: torch.Tensor,
        slopes_H: torch.Tensor | None,
        packed: PackedDocuments | None,
        softmax_scale: float,
        query_offset: int,
        horizon_eps: float,
    ) -> torch.Tensor:
        q_BSHK, k_BSHK, v_BSHK = _with_dense_heads(q_BSHK), _with_dense_heads(k_BSHK), _with_dense_heads(v_BSHK)
        slopes_H = None if slopes_H is None else slopes_H.contiguous()
        geometry, documents = make_geometry(
            q_BSHK, k_BSHK, packed, query_offset, triton_tiles.block_tokens(q_BSHK.dtype)
        )
        o_BSHK, lse_GS, first_keys_GN = run_forward(
            q_BSHK, k_BSHK, v_BSHK, slopes_H, geometry, documents, softmax_scale, horizon_eps
        )
        ctx.save_for_backward(q_BSHK, k_BSHK, v_BSHK, o_BSHK, lse_GS, slopes_H, first_keys_GN)
        ctx.geometry, ctx.documents, ctx.softmax_scale = geometry, documents, softmax_scale
        return o_BSHK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do_BSHK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        do_BSHK = _with_dense_heads(do_BSHK)
        given = {"geometry": ctx.geometry, "documents": ctx.documents, "softmax_scale": ctx.softmax_scale}
        gradients = run_backward(do_BSHK, *ctx.saved_tensors, **given)
        return *gradients, None, None, None, None, None


def run_forward(
    q_BSHK: torch.Tensor,
    k_BSHK: torch.Tensor,
    v_BSHK: torch.Tensor,
    slopes_H: torch.Tensor | None,
    geometry: Geometry,
    documents: Documents,
    softmax_scale: float,
    horizon_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the output, the base-2 log-sum-exp [G, queries], and each query block's first key, None for no horizon."""
    if slopes_H is None or geometry.num_key_blocks < _MIN_HORIZON_BLOCKS:
        horizon_eps = 0.0
    attend, find_norms = _forward_launches(
        q_BSHK.device, q_BSHK.dtype, slopes_H is None, geometry, q_BSHK.stride(), k_BSHK.stride(), v_BSHK.stride(),
        softmax_scale, horizon_eps, torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    groups = geometry.num_groups
    o_BSHK = torch.empty(q_BSHK.shape, dtype=q_BSHK.dtype, device=q_BSHK.device)
    lse_GS = torch.empty(groups, geometry.num_queries, device=q_BSHK.device)
    norms_GN = first_keys_GN = None
    with torch.cuda.device_of(q_BSHK):  # Triton launches on the current device
        if find_norms is not None:
            norms_GN = lse_GS.new_empty(groups, geometry.num_key_blocks)
            first_keys_GN = lse_GS.new_empty(groups, geometry.num_query_blocks, dtype=torch.int32)
            find_norms(k_BSHK, norms_GN, *documents)
        attend(q_BSHK, k_BSHK, v_BSHK, o_BSHK, lse_GS, slopes_H, norms_GN, first_keys_GN, *documents)
    return o_BSHK, lse_GS, first_keys_GN


def run_backward(
    do_BSHK: torch.Tensor,
    q_BSHK: torch.Tensor,
    k_BSHK: torch.Tensor,
    v_BSHK: torch.Tensor,
    o_BSHK: torch.Tensor,
    lse_GS: torch.Tensor,
    slopes_H: torch.Tensor | None,
    first_keys_GN: torch.Tensor | None,
    *,
    geometry: Geometry,
    documents: Documents,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk and dv from what ``run_forward`` was given and has returned."""
    dq_BSHK, dk_BSHK, dv_BSHK = empty_gradients(q_BSHK, k_BSHK, v_BSHK)
    find_dq, find_dk_dv = _backward_launches(
        q_BSHK.device, q_BSHK.dtype, slopes_H is None, first_keys_GN is None, geometry, q_BSHK.stride(),
        k_BSHK.stride(), v_BSHK.stride(), do_BSHK.stride(), dq_BSHK.stride(), dk_BSHK.stride(), softmax_scale,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    delta_GS = torch.empty_like(lse_GS)  # written by the first kernel, read by the second
    found = (lse_GS, delta_GS, slopes_H, first_keys_GN, *documents)
    with torch.cuda.device_of(q_BSHK):
        find_dq(q_BSHK, k_BSHK, v_BSHK, o_BSHK, do_BSHK, dq_BSHK, *found)
        find_dk_dv(q_BSHK, k_BSHK, v_BSHK, do_BSHK, dk_BSHK, dv_BSHK, *found)
    return dq_BSHK, dk_BSHK, dv_BSHK


@lru_cache(maxsize=_MAX_SHAPES)
def _forward_launches(
    device: torch.device,  # a compiled kernel is loaded into one device
    dtype: torch.dtype,
    no_slopes: bool,
    geometry: Geometry,
    q_strides: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_strides: tuple[int, ...],
    softmax_scale: float,
    horizon_eps: float,
    deterministic: bool,
) -> tuple[Launch, Launch | None]:
    """Return the launches of the forward pass, and of the norms before it if there is a horizon.

    The cache goes by the arguments: everything that Triton specialises a kernel for must be among them, used or not.
    """
    shape, groups = geometry.arguments(), geometry.num_groups
    programs = groups * geometry.num_query_blocks
    arguments = {
        "softmax_scale": softmax_scale,
        "log2_inverse_eps": 0.0 if horizon_eps == 0.0 else -math.log2(horizon_eps),
        **geometry.strides(q=q_strides, k=k_strides, v=v_strides, o=geometry.dense_strides(geometry.num_queries)),
        **shape,
        "length_bucket": geometry.num_keys.bit_length(),
        "SCAN": triton_tiles.scan_blocks(),
    }
    attend = Launch(_choose_tuner(triton_forward.forward_kernel, deterministic), lambda _: programs, arguments)
    if horizon_eps == 0.0:
        return attend, None
    norms = groups * geometry.num_key_blocks
    find_norms = Launch(triton_forward.key_norms_kernel, lambda _: norms, {**geometry.strides(k=k_strides), **shape})
    return attend, find_norms


@lru_cache(maxsize=_MAX_SHAPES)
def _backward_launches(
    device: torch.device,
    dtype: torch.dtype,
    no_slopes: bool,
    no_horizon: bool,
    geometry: Geometry,
    q_strides: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_strides: tuple[int, ...],
    do_strides: tuple[int, ...],
    dq_strides: tuple[int, ...],
    dk_strides: tuple[int, ...],
    softmax_scale: float,
    deterministic: bool,
) -> tuple[Launch, Launch]:
    """Return the launches for dq, and for dk and dv; see ``_forward_launches``."""
    arguments = {
        "softmax_scale": softmax_scale,
        **geometry.strides(q=q_strides, k=k_strides, v=v_strides, do=do_strides),
        **geometry.arguments(),
        "length_bucket": geometry.num_keys.bit_length(),
    }
    tokens = geometry.num_groups * geometry.block
    find_dq = Launch(
        _choose_tuner(triton_backward.query_gradient_kernel, deterministic),
        lambda tile: tokens * geometry.num_query_blocks // tile["BLOCK_M"],
        arguments | geometry.strides(o=geometry.dense_strides(geometry.num_queries), dq=dq_strides),
    )
    find_dk_dv = Launch(
        _choose_tuner(triton_backward.key_gradient_kernel, deterministic),
        lambda tile: tokens * geometry.num_key_blocks // tile["BLOCK_N"],
        arguments | geometry.strides(dk=dk_strides) | {"SCAN": triton_tiles.scan_blocks()},
    )
    return find_dq, find_dk_dv


def _choose_tuner(kernel: Any, deterministic: bool) -> Any:
    return triton_tiles.with_fixed_tile(kernel) if deterministic else kernel


def _with_dense_heads(x_BSHK: torch.Tensor) -> torch.Tensor:
    """Return the tensor with its last dimension contiguous; the kernels take any other stride."""
    return x_BSHK if x_BSHK.stride(-1) == 1 else x_BSHK.contiguous()
