"""Timing of attention functions in turns, and their memory; megalibi's tools/benchmark_attention.py is the command.

All contestants of a case are timed one after the other, again and again, so that the machine's other work hits them
alike; ratios are taken turn by turn.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from alibi_attention.attention import attention, backends
from alibi_attention.backend import Call
from alibi_attention.bench.peers import PEERS, Attend, build_plain
from alibi_attention.slopes import alibi_slopes

PLAIN = "plain"
FORMULA = "4 * batch * heads * length^2 * head_dim / 2 for the forward pass, 2.5 times that more for the backward pass"
MODES = {"forward": 1.0, "forward_backward": 3.5}  # by how much the work is more than the forward pass's
_BYTES_PER_SCORE = {"reference": 24, "unfused": 24}
_MEMORY_SHARE = 0.7  # of what is free
_LEAST_SECONDS = 0.05  # of one measurement: short calls are repeated within it
_MOST_CALLS = 100
_WARM_UP_LENGTH = 64
_CALLS_BEFORE_CAPTURE = 3


@dataclass(frozen=True)
class Case:
    """The problem that all contestants are given."""

    device: str
    """The device type, ``cpu`` or ``cuda``."""
    dtype: str
    """Type of q, k and v, as torch writes it."""
    batch: int
    """The number of rows in the batch."""
    length: int
    """Number of queries, and of keys."""
    num_heads: int
    """Number of heads; their slopes are those of a model with this number of heads."""
    head_dim: int
    """The head dimension of q, k and v."""
    mode: str
    """What is timed: one of ``MODES``."""
    qk: str | None = None
    """File with q and k of a trained model, or None for standard normal inputs."""
    cuda_graph: bool = False
    """Whether a captured CUDA graph is timed, which leaves out what the host does between the kernels."""

    @property
    def flop(self) -> float:
        """Floating point operations, by ``FORMULA``."""
        forward = 4 * self.batch * self.num_heads * self.length**2 * self.head_dim / 2
        return MODES[self.mode] * forward


@dataclass(frozen=True)
class Contestant:
    """An attention function, which may not be able to run here."""

    what: str
    """What is timed, in words."""
    build: Callable[[torch.Tensor, torch.Tensor], Attend]
    """Returns the function that is timed, for a sample of q and the slopes."""
    refusal: str | None = None
    """Why it cannot run here, or None if it can."""
    bytes_per_score: int = 0
    """About the most bytes that it holds for each of its batch x heads x length^2 scores."""
    by_name_alone: bool = False
    """Whether it takes part only where it is named, because an interpreter runs it here, which takes hours."""


def find_contestants(device: str, dtype: str, head_dim: int) -> dict[str, Contestant]:
    """Return plain attention, every back end and every peer, by name."""
    call = Call(device, getattr(torch, dtype), head_dim)
    found = {PLAIN: Contestant("PyTorch's SDPA, causal, no bias", build_plain)}
    for backend in backends():
        found[backend.name] = Contestant(
            what=backend.exactness,
            build=partial(_build_ours, backend.name),
            refusal=backend.find_refusal(call),
            bytes_per_score=_BYTES_PER_SCORE.get(backend.name, 0),
            by_name_alone=device == "cpu" and not backend.auto,
        )
    for peer in PEERS:
        refusal = peer.find_refusal(call.device_type, call.dtype)
        found[peer.name] = Contestant(peer.what, peer.build, refusal, peer.bytes_per_score)
    return found


def make_case_inputs(case: Case) -> list[torch.Tensor]:
    """Return q, k, v and an upstream gradient.

    Raises:
        ValueError: The file of q and k cannot be read, or holds less or something else.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.length, case.num_heads, case.head_dim)
    inputs = [torch.randn(shape, generator=generator) for _ in range(4)]
    if case.qk is not None:
        inputs[:2] = [x[:, : case.length].expand(shape) for x in _read_qk(case.qk, case)]
    return [x.to(case.device, getattr(torch, case.dtype)).contiguous() for x in inputs]


def measure_times(case: Case, names: Sequence[str], repeats: int) -> dict[str, dict[str, Any]]:
    """Time contestants in turns, plain attention among them; return figures, or why there are none, by name."""
    figures: dict[str, dict[str, Any]] = {}
    calls: dict[str, tuple[Callable[[], None], int]] = {}
    inputs, contestants = make_case_inputs(case), find_contestants(case.device, case.dtype, case.head_dim)
    for name in dict.fromkeys((PLAIN, *names)):
        skipped = contestants[name].refusal or _find_lack_of_memory(contestants[name], case)
        if skipped is None:
            try:
                call = _make_call(contestants[name], inputs, case)
                _time_calls(call, 1, case.device)  # compiles, allocates
                call = _capture(call) if case.cuda_graph else call
                count = round(_LEAST_SECONDS / _time_calls(call, 1, case.device))
                calls[name] = (call, min(max(count, 1), _MOST_CALLS))
            except (RuntimeError, MemoryError) as error:
                skipped = " ".join(str(error).split())[:200]
        if skipped is not None:
            figures[name] = {"skipped": skipped}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        order = list(calls)
        first = repeat % len(order)
        for name in order[first:] + order[:first]:
            seconds[name].append(_time_calls(*calls[name], case.device))
    for name, values in seconds.items():
        ratios = [ours / plain for ours, plain in zip(values, seconds[PLAIN], strict=True)]
        figures[name] = {
            "seconds": _summarize(values),
            "ratio_to_plain": _summarize(ratios),
            "tflops_per_second": case.flop / statistics.median(values) / 1e12,
            "calls_per_repeat": calls[name][1],
        }
    return figures


def measure_call_memory(case: Case, name: str) -> int | None:
    """Return the most bytes that a call holds beyond q, k, v and the upstream gradient: bias, output, gradients, all.

    None if the process that measures it died, as one does that the system ends for its memory.
    """
    if case.device == "cuda":
        return _peak_bytes(case, name)
    # A fresh process: what an earlier call freed and the allocator kept would not be counted.
    try:
        with ProcessPoolExecutor(1, mp_context=_context()) as pool:
            return pool.submit(_peak_bytes, case, name, torch.get_num_threads()).result()
    except BrokenProcessPool:
        return None


@cache
def _context() -> multiprocessing.context.BaseContext:
    """Processes forked from a server that has imported all this and computed nothing: fresh, and quick to start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _peak_bytes(case: Case, name: str, num_threads: int = 0) -> int:
    if num_threads:
        torch.set_num_threads(num_threads)
    contestant = find_contestants(case.device, case.dtype, case.head_dim)[name]
    small = replace(case, length=min(case.length, _WARM_UP_LENGTH))
    _make_call(contestant, make_case_inputs(small), small)()  # libraries load, thread pools start
    inputs = make_case_inputs(case)
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is in use
        before = _peak_resident_bytes()
    _make_call(contestant, inputs, case)()
    return (torch.cuda.max_memory_allocated() if case.device == "cuda" else _peak_resident_bytes()) - before


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def _make_call(contestant: Contestant, inputs: Sequence[torch.Tensor], case: Case) -> Callable[[], None]:
    """Return the function that is timed."""
    attend = contestant.build(inputs[0], alibi_slopes(case.num_heads).to(case.device))
    *qkv, upstream = inputs

    def forward() -> None:
        with torch.no_grad():
            attend(*qkv)

    leaves = [x.detach().requires_grad_() for x in qkv]

    def forward_backward() -> None:
        torch.autograd.grad(attend(*leaves), leaves, upstream)

    return forward if case.mode == "forward" else forward_backward


def _capture(call: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of a call's CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # where nothing may be new any more when it is captured
        for _ in range(_CALLS_BEFORE_CAPTURE):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _time_calls(call: Callable[[], None], count: int, device: str) -> float:
    """Return the seconds of one of ``count`` calls."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / count
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def _find_lack_of_memory(contestant: Contestant, case: Case) -> str | None:
    """Return why a contestant would not fit, from an estimate of its S x S matrices."""
    needed = contestant.bytes_per_score * case.batch * case.num_heads * case.length**2
    free = torch.cuda.mem_get_info()[0] if case.device == "cuda" else _available_bytes()
    if needed <= _MEMORY_SHARE * free:
        return None
    return f"about {needed / 1e9:.0f} GB of S x S matrices, with {free / 1e9:.0f} GB free"


def _available_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return 1024 * int(next(line.split()[1] for line in meminfo.read_text().splitlines() if "MemAvailable" in line))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _build_ours(name: str, q_BSHK: torch.Tensor, slopes_H: torch.Tensor) -> Attend:
    return partial(attention, alibi_slopes=slopes_H, backend=name)


def _read_qk(path: str, case: Case) -> list[torch.Tensor]:
    """Read q and k, [1, S, H, K] each."""
    try:
        saved = torch.load(path, weights_only=True)
        q, k = (saved[name].float() for name in "qk")
    except Exception as error:  # whatever is wrong with somebody's file
        raise ValueError(f"{path} cannot be read as q and k: {error}") from error
    _, length, num_heads, head_dim = q.shape
    if length < case.length or (num_heads, head_dim) != (case.num_heads, case.head_dim):
        wanted = f"{case.length} tokens, {case.num_heads} heads of {case.head_dim}"
        raise ValueError(f"{path} holds {length} tokens, {num_heads} heads of {head_dim}, not {wanted}")
    return [q, k]


def _summarize(values: Sequence[float]) -> dict[str, Any]:
    """Return median and quartiles, and all that was measured."""
    low = high = values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, method="inclusive")
    return {"median": statistics.median(values), "low": low, "high": high, "repeats": list(values)}
