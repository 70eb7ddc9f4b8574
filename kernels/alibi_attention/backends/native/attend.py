"""Our C++ kernel for CPUs (native.cpp): the fp32 bias in registers, and the early exit past each head's horizon.

The kernel is compiled once per machine, in seconds, by the C++ compiler found there; where there is none the other back
ends do the work. The library lies in the user's cache (PyTorch's, for its own extensions: TORCH_EXTENSIONS_DIR names
another), under a name made of its source, the compiler and the processor, and gets there by a rename: ranks that start
together may each compile it, and none ever waits for another.

To map a library that a full disk or an interruption cut short ends the process without a word. So the library is on the
disk before it has its name, its size and checksum lie beside it, and one that does not match them is compiled again.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from alibi_attention.backend import Capability
from alibi_attention.documents import PackedDocuments
from alibi_attention.packed import empty_gradients

NAME = "native"

_LOGGER = logging.getLogger("alibi_attention")
_SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.cpp", "native_tile.h"))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 64  # kBlock of native.cpp
# No -ffast-math: the exponential rounds by adding and subtracting a large number.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")


def capability() -> Capability:
    """Return what this back end can do; the first call compiles the kernel if this machine has not done so yet."""
    library, reason = _load()
    return Capability(
        name=NAME,
        usable=library is not None,
        reason=reason,
        exactness="everything in fp32, whatever the type of q, k and v; memory linear in S",
        devices=("cpu",),
        dtypes=tuple(dtype for dtype in _DTYPES if library is None or hasattr(library, _function("forward", dtype))),
        dropout="",
        cu_seqlens="native",
        horizon=True,
        max_head_dim=256,
    )


def attend(
    q_BSHK: torch.Tensor,
    k_BSHK: torch.Tensor,
    v_BSHK: torch.Tensor,
    *,
    alibi_slopes: torch.Tensor | None,
    distance_bias: torch.Tensor | None,
    softmax_scale: float,
    documents: PackedDocuments | None,
    dropout_p: float,
    query_offset: int,
    horizon_eps: float,
) -> torch.Tensor:
    """Attend causally in C++. See ``alibi_attention.attention`` for the arguments."""
    slopes_H = torch.zeros(q_BSHK.shape[2]) if alibi_slopes is None else alibi_slopes.contiguous()
    lengths = None if documents is None else documents.lengths
    constants = {"softmax_scale": softmax_scale, "query_offset": query_offset, "horizon_eps": horizon_eps}
    output_BSHK: torch.Tensor = _Attention.apply(q_BSHK, k_BSHK, v_BSHK, slopes_H, lengths, constants)
    return output_BSHK


class _Attention(torch.autograd.Function):
    """Saves the output, the largest score and the sum of each row, and how far left each block of queries went."""

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
    """Call the kernel; results are written into the tensors that forward and backward made for them."""
    library, reason = _load()
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


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the compiled kernel, or None and why there is none."""
    try:
        # PyTorch's ways to find the user's compiler and cache, for its own extensions; needs setuptools.
        with _muted("torch.utils.cpp_extension"):  # it warns where CUDA's compiler is and no GPU
            from torch.utils.cpp_extension import get_cxx_compiler, get_default_build_root

        compiler = shutil.which(get_cxx_compiler())
        if compiler is None:
            return None, f"no C++ compiler is found ({get_cxx_compiler()}, by CXX or by default)"
        # The macros tell the compiler's version and what the processor can do.
        macros = _run_compiler(compiler, *_FLAGS, "-x", "c++", "-dM", "-E", os.devnull)
        key = hashlib.sha256(
            "\0".join((macros, *_FLAGS, *(source.read_text() for source in _SOURCES))).encode()
        ).hexdigest()[:16]
        root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
        return _open(compiler, Path(root) / "alibi_attention" / f"native-{key}.so"), ""
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"the C++ kernel cannot be had: {error}"


@contextlib.contextmanager
def _muted(name: str) -> Iterator[None]:
    """Let a logger say errors alone."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _open(compiler: str, library: Path) -> ctypes.CDLL:
    """Return the library, compiled anew unless it lies in the cache as it was written."""
    if _is_whole(library):
        return ctypes.CDLL(str(library))
    _LOGGER.info("compiling %s with %s into %s (once per machine)", _SOURCES[0].name, compiler, library.parent)
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / library.name
        _run_compiler(compiler, *_FLAGS, "-fPIC", "-shared", str(_SOURCES[0]), "-o", str(built))
        try:
            _keep(built, library)
        except OSError as error:
            _LOGGER.warning(
                "the compiled kernel cannot be kept in %s, so that every start compiles it again: %s; "
                "TORCH_EXTENSIONS_DIR names another folder",
                library.parent,
                error,
            )
            return ctypes.CDLL(str(built))  # what is mapped stays when its name goes
    return ctypes.CDLL(str(library))


def _is_whole(library: Path) -> bool:
    """Tell whether a library lies in the cache, and has the size and the checksum that it was written with."""
    try:
        if not library.exists():
            return False
        found, recorded = _describe(library), _record_of(library).read_text(errors="replace")
    except OSError as error:
        _LOGGER.warning("the compiled kernel in the cache is not used: %s", error)
        return False
    if found != recorded:
        _LOGGER.warning("the compiled kernel in the cache is damaged and not used: %s", library)
    return found == recorded


def _keep(built: Path, library: Path) -> None:
    """Put a library into the cache, on the disk before it has its name there, and its record beside it.

    Others may do the same at the same time. The compiler gives all of them the same bytes; where it did not, the record
    of one beside the library of another would cost the next process a compilation, and no more.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as aside:
        copy = Path(shutil.copy(built, aside))
        record = _record_of(copy)
        record.write_text(_describe(built))
        for path in (copy, record):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        if _describe(copy) != record.read_text():
            raise OSError(f"{copy} is not what was written")
        record.replace(_record_of(library))  # first: who finds the library finds its record
        copy.replace(library)


def _record_of(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")


def _describe(library: Path) -> str:
    """Return the size in bytes and the checksum of a file, as they lie beside it."""
    content = library.read_bytes()
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}\n"


def _run_compiler(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{command[0]}: {errors[0]}")
    return done.stdout
