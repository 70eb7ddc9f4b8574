"""Our C++ kernel for CPUs (native.cpp): the fp32 bias in registers, and no visit to keys past a head's horizon.

Shape suffixes: B batch, S sequence, H heads, K head dimension.
"""

from __future__ import annotations

import ctypes
from itertools import accumulate
from typing import Any

import torch

from alibi_attention.backend import AttentionInputs, Capability
from alibi_attention.backends.native import library as native_library
from alibi_attention.packed import empty_gradients

NAME = "native"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 64  # kBlock of native.cpp


def capability() -> Capability:
    """Return what this back end can do; the first call compiles the kernel if this machine has not done so yet."""
    library, reason = native_library.load_library()
    return Capability(
        name=NAME,
        usable=library is not None,
        reason=reason,
        exactness="everything in fp32, whatever the type of q, k and v; memory linear in S",
        devices=("cpu",),
        dtypes=tuple(dtype for dtype in _DTYPES if library is None or hasattr(library, _function("forward", dtype))),
        dropout=False,
        cu_seqlens="native",
        horizon=True,
        max_head_dim=256,
    )


def attend(inputs: AttentionInputs) -> torch.Tensor:
    """Attend causally in C++, to the keys within each head's horizon."""
    slopes_H = inputs.alibi_slopes
    slopes_H = torch.zeros(inputs.q.shape[2]) if slopes_H is None else slopes_H.contiguous()
    lengths = None if inputs.documents is None else inputs.documents.lengths
    constants = {name: getattr(inputs, name) for name in ("softmax_scale", "query_offset", "horizon_eps")}
    output_BSHK: torch.Tensor = _Attention.apply(*inputs.qkv, slopes_H, lengths, constants)
    return output_BSHK


class _Attention(torch.autograd.Function):
    """Saves the output, the largest score and the sum of each row, and the first key that each block of queries saw."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BSHK: torch.Tensor,
        k_BSHK: torch.Tensor,
        v_BSHK: torch.Tensor,
        slopes_H: torch.Tensor,
        lengths: tuple[int, ...] | None,
        constants: dict[str, float],
    ) -> torch.Tensor:
        q_BSHK, k_BSHK, v_BSHK = (_with_even_rows(x, flat=lengths is not None) for x in (q_BSHK, k_BSHK, v_BSHK))
        sequences, num_blocks = _list_sequences(q_BSHK, k_BSHK, v_BSHK, lengths)
        num_heads = q_BSHK.shape[2]
        tensors = {
            "q": q_BSHK,
            "k": k_BSHK,
            "v": v_BSHK,
            "result_q": torch.empty(q_BSHK.shape, dtype=q_BSHK.dtype),
            "largest": torch.empty(num_heads, q_BSHK.shape[0] * q_BSHK.shape[1]),
            "inverse_sum": torch.empty(num_heads, q_BSHK.shape[0] * q_BSHK.shape[1]),
            "first_block": torch.empty(num_heads, num_blocks, dtype=torch.int32),
            "slopes": slopes_H,
            "sequences": sequences,
        }
        _run("forward", tensors, constants)
        ctx.names, ctx.constants = list(tensors), constants
        ctx.save_for_backward(*tensors.values())
        return tensors["result_q"]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BSHK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        tensors |= {"out": tensors["result_q"], "grad_out": grad_BSHK.contiguous()}
        gradients = empty_gradients(*(tensors[name] for name in "qkv"))
        results = dict(zip(("result_q", "result_k", "result_v"), gradients, strict=True))
        _run("backward", tensors | results, ctx.constants)
        return *gradients, None, None, None


def _with_even_rows(x_BSHK: torch.Tensor, flat: bool) -> torch.Tensor:
    """Return x with contiguous rows and, where documents cross the rows of the batch, with tokens equally far apart."""
    if x_BSHK.stride(-1) != 1 or (flat and x_BSHK.stride(0) != x_BSHK.shape[1] * x_BSHK.stride(1)):
        return x_BSHK.contiguous()
    return x_BSHK


def _list_sequences(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...] | None
) -> tuple[torch.Tensor, int]:
    """Return ``Sequence`` of native.cpp for each row of the batch or document with tokens, and the number of blocks."""
    if lengths is None:
        num_queries, num_keys = [q.shape[1]] * q.shape[0], [k.shape[1]] * k.shape[0]
        bases = [[row * x.stride(0) for row in range(x.shape[0])] for x in (q, k, v)]
    else:
        num_queries = num_keys = [length for length in lengths if length > 0]
        bases = [[start * x.stride(1) for start in _starts(num_keys)] for x in (q, k, v)]
    blocks = [-(-queries // _BLOCK) for queries in num_queries]
    columns = (*bases, _starts(num_queries), _starts(num_keys), _starts(blocks), num_queries, num_keys)
    return torch.tensor(columns, dtype=torch.int64).T.contiguous(), sum(blocks)


def _starts(counts: list[int]) -> list[int]:
    return list(accumulate(counts[:-1], initial=0))


class _Problem(ctypes.Structure):
    """``Problem`` of native.cpp, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "grad_out", "result_q", "result_k", "result_v")),
        *((name, ctypes.c_void_p) for name in ("largest", "inverse_sum", "first_block", "slopes", "sequences")),
        *((name, ctypes.c_int64) for name in ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head")),
        ("result_token", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("num_sequences", "num_heads", "head_dim", "total_queries")),
        *((name, ctypes.c_int64) for name in ("total_query_blocks", "query_offset", "num_threads")),
        ("softmax_scale", ctypes.c_float),
        ("horizon_eps", ctypes.c_double),
    )


def _run(direction: str, tensors: dict[str, torch.Tensor], constants: dict[str, float]) -> None:
    """Call the kernel, which writes its results into the tensors that forward and backward have made for them."""
    library, reason = native_library.load_library()
    assert library is not None, reason
    q_BSHK = tensors["q"]
    fields: dict[str, Any] = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    for name in "qkv":
        _, fields[f"{name}_token"], fields[f"{name}_head"], _ = tensors[name].stride()
    problem = _Problem(
        num_sequences=len(tensors["sequences"]),
        num_heads=q_BSHK.shape[2],
        head_dim=q_BSHK.shape[3],
        total_queries=q_BSHK.shape[0] * q_BSHK.shape[1],
        total_query_blocks=tensors["first_block"].shape[1],
        result_token=tensors["result_q"].stride(1),
        num_threads=torch.get_num_threads(),
        **fields,
        **constants,
    )
    if getattr(library, _function(direction, q_BSHK.dtype))(ctypes.byref(problem)) != 0:
        raise MemoryError(f"alibi_attention: no memory for attention of q {tuple(q_BSHK.shape)}")


def _function(direction: str, dtype: torch.dtype) -> str:
    return f"alibi_{direction}_{str(dtype).removeprefix('torch.')}"
