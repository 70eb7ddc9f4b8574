"""Compile the Triton kernels on all cores, before a GPU waits for them one by one.

Triton keeps what it has compiled on disk (TRITON_CACHE_DIR). Here its driver is replaced by one that names the GPU and
launches nothing. Calls then go their usual way through tuner, specialisation and compiler, in processes that do not use
the GPU, and later processes find the compiled kernels.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch

_LENGTHS = (97, 1025)  # without a horizon and with one
_HEADS = 2
_DATA_CENTER_SHARED_BYTES = 232_448
"""Shared memory of a program on an H100, assumed where a capability is given; a GPU that is here is asked."""


@dataclass(frozen=True)
class Target:
    """The GPU to compile for."""

    capability: int
    """Compute capability, 90 for an H100."""
    shared_bytes: int
    """Most shared memory that a program may have, in bytes."""
    multiprocessors: int
    """The number of the GPU's multiprocessors."""


@dataclass(frozen=True)
class SampleCall:
    """A call of attention, forward and backward, that compiles the kernels which other calls like it need."""

    dtype: str
    """Type of q, k and v, as torch writes it."""
    head_dim: int
    """Head dimension of q, k and v."""
    length: int
    """The number of tokens in a row."""
    slopes: bool = True
    """Whether slopes are given, as for ALiBi."""
    packed: bool = False
    """Whether rows are packed documents."""


def plan_calls() -> list[SampleCall]:
    """Return the calls that models and tests make, the slow ones to compile first."""
    found = [
        SampleCall(dtype, head_dim, length, slopes)
        for dtype, head_dim, length, slopes in itertools.product(
            ("bfloat16", "float32", "float16"), (64, 128), _LENGTHS, (True, False)
        )
    ]
    found += [SampleCall("bfloat16", head_dim, _LENGTHS[1]) for head_dim in (32, 80, 96, 256)]
    found += [SampleCall("bfloat16", head_dim, 1024, packed=True) for head_dim in (64, 128)]
    return sorted(found, key=lambda call: -(call.dtype == "float32") * call.head_dim)


def compile_calls(
    calls: Sequence[SampleCall], target: Target, workers: int
) -> Iterator[tuple[SampleCall, float | str]]:
    """Compile the kernels of calls, several at once; yield for each the seconds it took, or what went wrong.

    TRITON_INTERPRET must not be set: Triton would compile nothing.

    Args:
        calls: What to compile for, from plan_calls.
        target: The GPU to compile for.
        workers: Number of processes.
    """
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for job, call in [(pool.submit(_compile, call, target), call) for call in calls]:
            fault = job.exception()
            yield call, job.result() if fault is None else repr(fault)


def _compile(call: SampleCall, target: Target) -> float:
    """Compile the kernels of a call, in a process of its own; return the seconds it took."""
    _replace_driver(target)
    from alibi_attention import PackedDocuments, alibi_slopes
    from alibi_attention.backend import AttentionInputs
    from alibi_attention.backends.triton.attend import attend

    began = time.monotonic()
    documents = None
    if call.packed:
        boundaries = torch.tensor([0, call.length // 2, call.length], dtype=torch.int32)
        documents = PackedDocuments(boundaries, call.length)
    shape, dtype = (1, call.length, _HEADS, call.head_dim), getattr(torch, call.dtype)
    q, k, v, upstream = (torch.zeros(shape, dtype=dtype) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    inputs = AttentionInputs(
        q,
        k,
        v,
        alibi_slopes=alibi_slopes(_HEADS) if call.slopes else None,
        distance_bias=None,
        softmax_scale=call.head_dim**-0.5,
        documents=documents,
        dropout_p=0.0,
        query_offset=0,
        horizon_eps=2.0**-24,
    )
    out = attend(inputs)
    torch.autograd.grad(out, (q, k, v), upstream)
    return time.monotonic() - began


def _replace_driver(target: Target) -> None:
    """Give Triton, in this process, a driver that compiles for the target and launches nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner

    device = {
        "max_shared_mem": target.shared_bytes,
        "multiprocessor_count": target.multiprocessors,
        "warpSize": 32,
    }

    class Utils:
        get_device_properties = staticmethod(lambda _: device)
        load_binary = staticmethod(lambda *_: (1, 1, 32, 0, 1024))
        unload_module = staticmethod(lambda _: None)

    class Driver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda _: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", target.capability, 32))
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
        get_benchmarker = staticmethod(lambda: _run_once)
        launcher_cls = staticmethod(lambda source, metadata: lambda *arguments, **named: None)
        utils = Utils

    driver.set_active(Driver())
    Autotuner.do_bench = property(lambda tuner: _run_once)


def _run_once(call: Any, quantiles: Any = None, **_: Any) -> list[float]:
    """Take the place of Triton's clock: every tile is compiled and none is timed."""
    call()
    return [1.0, 1.0, 1.0]


def find_target(capability: int | None) -> Target:
    """Return the GPU to compile for.

    Args:
        capability: Compute capability, 90 for an H100, or None for the GPU that is here.

    Raises:
        ValueError: No capability is given, and there is no GPU.
    """
    if capability is not None:
        return Target(capability, _DATA_CENTER_SHARED_BYTES, 132)
    if not torch.cuda.is_available():
        raise ValueError("torch sees no GPU: give --capability, 90 for an H100, 80 for an A100")
    gpu = torch.cuda.get_device_properties(0)
    shared_bytes = getattr(gpu, "shared_memory_per_block_optin", _DATA_CENTER_SHARED_BYTES)  # not of early versions
    return Target(10 * gpu.major + gpu.minor, shared_bytes, gpu.multi_processor_count)
