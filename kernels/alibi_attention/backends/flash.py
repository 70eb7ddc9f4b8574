"""flash-attn 2's own ALiBi path: its kernels take the slopes and form the bias in fp32, in registers.

Its causal CUDA kernel adds slope * column instead of -slope * distance. That shifts every row as a whole: the softmax
is the same, but the log-sum-exp is shifted too, and must be corrected before chunks are merged by it. Nothing here
returns it.

Shape suffixes: B batch, S sequence, H heads, K head dimension, T all tokens of the batch, N documents.
"""

from __future__ import annotations

import re

import torch

from alibi_attention.backend import AttentionInputs, Capability

try:
    from flash_attn import __version__ as _VERSION
    from flash_attn import flash_attn_func, flash_attn_varlen_func
except ImportError as error:
    _VERSION, _IMPORT_FAULT = "", f"flash-attn cannot be imported: {error}"
else:
    _IMPORT_FAULT = ""

NAME = "flash"

_MAX_HEAD_DIM = 256
# The operator's name in PyTorch's dispatcher. Versions before 2.7 have none, and run on CUDA only.
_FORWARD_OPERATOR = "flash_attn::_flash_attn_forward"


def capability() -> Capability:
    """Return what this back end can do; a build of flash-attn that lacks a type or head dimension raises later."""
    fault = _IMPORT_FAULT or find_version_fault(_VERSION)
    # No release has kernels for the CPU. Where its operators have some, they are an interpreter's, for tests.
    on_cpu = not fault and _has_cpu_kernel()
    return Capability(
        name=NAME,
        usable=not fault,
        reason=fault,
        exactness="bias, softmax and sums in fp32, weights rounded to 16 bits; memory linear in S",
        devices=("cuda", "cpu") if on_cpu else ("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        dropout=True,
        cu_seqlens="native",
        gap=False,
        max_head_dim=_MAX_HEAD_DIM,
        auto=not on_cpu,
    )


def find_version_fault(version: str) -> str:
    """Return why flash-attn of this version will not do, or an empty string."""
    # 2.4 brought alibi_slopes; the functions of flash-attn 3 and 4 do not take them.
    major, minor = (int(number) for number in re.findall(r"\d+", version)[:2])
    if (2, 4) <= (major, minor) < (3, 0):
        return ""
    return f"flash-attn {version} is installed: ALiBi slopes need 2.4 or a later 2.x"


def attend(inputs: AttentionInputs) -> torch.Tensor:
    """Attend causally to all keys, through flash-attn."""
    alibi_slopes, documents = inputs.alibi_slopes, inputs.documents
    arguments = {
        "dropout_p": inputs.dropout_p,
        "softmax_scale": inputs.softmax_scale,
        "causal": True,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    # Its backward allocates dq, dk and dv with the strides of q, k and v, and its kernels want the last one to be 1.
    q_BSHK, k_BSHK, v_BSHK = (x if x.stride(-1) == 1 else x.contiguous() for x in inputs.qkv)
    batch, num_queries = q_BSHK.shape[:2]
    if documents is None:
        # It lets the last query stand at the last key: the keys after that are the future of all queries.
        visible_keys = inputs.query_offset + num_queries
        k_BSHK, v_BSHK = k_BSHK[:, :visible_keys], v_BSHK[:, :visible_keys]
        slopes_BH = _repeat(alibi_slopes, batch)
        return _align_gradient(flash_attn_func(q_BSHK, k_BSHK, v_BSHK, alibi_slopes=slopes_BH, **arguments))

    output_THK = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q_BSHK, k_BSHK, v_BSHK)),
        cu_seqlens_q=documents.cu_seqlens,
        cu_seqlens_k=documents.cu_seqlens,
        max_seqlen_q=documents.max_length,
        max_seqlen_k=documents.max_length,
        alibi_slopes=_repeat(alibi_slopes, len(documents.lengths)),
        **arguments,
    )
    return _align_gradient(output_THK).unflatten(0, (batch, num_queries))


def _repeat(alibi_slopes: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """Return the slopes once for each row or document, a view [count, H]: the Triton kernels take no single row."""
    return None if alibi_slopes is None else alibi_slopes.contiguous().expand(count, -1)


def _align_gradient(output: torch.Tensor) -> torch.Tensor:
    """Give the output's gradient the output's strides: the Triton kernels of 2.8 read it by those, whatever its own."""
    strides = output.stride()  # not the tensor, which its own hook would keep alive

    def align(gradient: torch.Tensor) -> torch.Tensor:
        if gradient.stride() == strides:
            return gradient
        return torch.empty_strided(gradient.shape, strides, dtype=gradient.dtype, device=gradient.device).copy_(
            gradient
        )

    if output.requires_grad:
        output.register_hook(align)
    return output


def _has_cpu_kernel() -> bool:
    return torch._C._dispatch_has_kernel(_FORWARD_OPERATOR) and torch._C._dispatch_has_kernel_for_dispatch_key(
        _FORWARD_OPERATOR, "CPU"
    )
