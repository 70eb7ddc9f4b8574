"""What the kernels share. Importing it fails where Triton is missing or too old, which ``availability`` handles."""

from __future__ import annotations

import re

import triton
import triton.language as tl

# Earlier ones look for a GPU when a kernel is decorated, and fail where there is none.
if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < (3, 3):
    raise ImportError(f"triton {triton.__version__} is installed, the kernels need 3.3 or later")


@triton.jit
def round_to(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Return fp32 numbers in another type, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:  # Triton 3.6's interpreter cuts off
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


# Triton itself decides this when it decorates a function, from TRITON_INTERPRET.
INTERPRETED = not isinstance(round_to, triton.JITFunction)
_INTERPRETED = tl.constexpr(INTERPRETED)
