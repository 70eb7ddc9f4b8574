"""Matrix products in 16 bits, also on processors without instructions for them.

There PyTorch's own take 4 to 40 times as long as products in fp32 (on an AMD EPYC with AVX2 and no more). Products of
the same numbers in fp32, rounded in the end, are what the instructions give: they sum in fp32 too.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``, [.., O] from [.., I] and [O, I], in the type of x, which all of them have."""
    if not _is_better_in_fp32(x):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b``, [.., N, M] from [.., N, K] and [K, M], in the type of a, which both have."""
    if not _is_better_in_fp32(a):
        return a @ b
    return (a.float() @ b.float()).to(a.dtype)


def _is_better_in_fp32(x: Tensor) -> bool:
    return x.device.type == "cpu" and _lacks_instructions(x.dtype)


@cache
def _lacks_instructions(dtype: torch.dtype) -> bool:
    """Return whether this processor, with this PyTorch, has no fast products of a type of 16 bits."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if not torch.backends.mkldnn.is_available():
        return True
    has_bf16, has_fp16 = torch.ops.mkldnn._is_mkldnn_bf16_supported, torch.ops.mkldnn._is_mkldnn_fp16_supported
    return not (has_bf16() if dtype == torch.bfloat16 else has_fp16())
