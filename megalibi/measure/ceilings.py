"""The rates that a device reaches at best, in matrix products and in copies: no part of a training step is faster."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from megalibi.metrics.summary import Quartiles

SQUARE, COPY = "matmul bf16", "copy"
"""Names of the two ceilings that the parts of a step are compared with."""
REPEATS = 7
_WARM_CALLS = 3
_CPU_SHRINK = 32
"""On a CPU all sizes are divided by this: there only the measurement itself is tried."""
_COPY_BYTES = 1 << 30


def measure_ceilings(device: torch.device) -> dict[str, dict[str, Any]]:
    """Return what was measured, by name: the median and range of the rate, its unit, the shape and each repeat.

    The matrix products are large square ones in bf16 and in fp32, and in bf16 those of the 1.3B model at 16,384 tokens.
    Among these are its output layer (head) and a weight gradient, both of whose operands are transposed.

    Args:
        device: The GPU to measure, or the CPU.
    """
    found = {SQUARE: _measure_matmul(device, torch.bfloat16, (8192, 8192, 8192))}
    found[COPY] = _measure_copy(device)
    found["matmul fp32"] = _measure_matmul(device, torch.float32, (8192, 8192, 8192))
    for name, shape in _MODEL_SHAPES.items():
        found[f"{name} bf16"] = _measure_matmul(device, torch.bfloat16, shape, transposed=name.startswith("gradient"))
    return found


_MODEL_SHAPES = {
    "qkv": (16384, 6144, 2048),
    "attention output": (16384, 2048, 2048),
    "mlp up": (16384, 8192, 2048),
    "mlp down": (16384, 2048, 8192),
    "gradient of mlp up": (8192, 2048, 16384),
    "head": (16384, 50304, 2048),
}
"""Name of a matrix product [m, k] x [k, n] -> (m, n, k)."""


def _measure_matmul(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], *, transposed: bool = False
) -> dict[str, Any]:
    m, n, k = (max(64, size // (1 if device.type == "cuda" else _CPU_SHRINK)) for size in shape)
    if transposed:
        a = torch.randn(k, m, device=device, dtype=dtype).T
        b = torch.randn(k, n, device=device, dtype=dtype)
    else:
        a = torch.randn(m, k, device=device, dtype=dtype)
        b = torch.randn(n, k, device=device, dtype=dtype).T
    return _rates(lambda: a @ b, 2.0 * m * n * k / 1e12, device) | {"unit": "TFLOP/s", "shape": [m, n, k]}


def _measure_copy(device: torch.device) -> dict[str, Any]:
    size = _COPY_BYTES // (1 if device.type == "cuda" else _CPU_SHRINK)
    x = torch.ones(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return _rates(lambda: y.copy_(x), 2.0 * size / 1e12, device) | {"unit": "TB/s", "shape": [size]}


def _rates(call: Callable[[], Any], work: float, device: torch.device) -> dict[str, Any]:
    """Return median, lowest and highest rate, and the rate of each repeat."""
    for _ in range(_WARM_CALLS):
        call()
    rates = [work / _time(call, device) for _ in range(REPEATS)]
    return {"median": Quartiles.of(rates).median, "low": min(rates), "high": max(rates), "repeats": rates}


def _time(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call; on CUDA the mean of several in a row."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    calls = 10
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls
