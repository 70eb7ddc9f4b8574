"""The tile sizes that the Triton kernels may take: small fixed ones in the interpreter, a short list to time on a GPU.

triton.autotune times a list once for each kernel, type, padded head dimension and power of two of the length; under
torch.use_deterministic_algorithms the first of a list that fits is taken (``with_fixed_tile``). The lists hold tiles
that compile for sm_90 with few spilled registers or none and fit into its shared memory (results/kernels_compiled). An
H200 has run them (results/gpu_h200_first); which tile of a list it took was not recorded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

# Earlier ones look for a GPU when a kernel is decorated, and fail where there is none.
if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < (3, 3):
    raise ImportError(f"triton {triton.__version__} is installed, the kernels need 3.3 or later")


def _sample(x: int) -> int:
    return x


# Triton itself decides this when it decorates a function, from TRITON_INTERPRET.
INTERPRETED = not isinstance(triton.jit(_sample), triton.JITFunction)


def block_tokens(dtype: torch.dtype) -> int:
    """Return the number of tokens of a block; every kernel's tile divides it."""
    if INTERPRETED:
        return 64  # a short test has several, and few enough: the interpreter is slow by the call, not by the number
    return 64 if dtype.itemsize == 4 else 128


def scan_blocks() -> int:
    """Return how many blocks are tested at once for lying past the horizon."""
    return 4 if INTERPRETED else 128


@dataclass(frozen=True)
class Tiles:
    """The sizes to choose from for one kernel."""

    interpreted: tuple[int, int]
    """BLOCK_M queries and BLOCK_N keys in the interpreter."""
    candidates: Mapping[tuple[int, int], tuple[tuple[int, int, int, int], ...]]
    """By bytes of an element and largest padded head dimension: BLOCK_M, BLOCK_N, warps, stages of the pipeline."""

    def tune(self, kernel: Any) -> Any:
        """Give the kernel its BLOCK_M and BLOCK_N: the fastest of the candidates for each kind of call."""
        if INTERPRETED:
            configs = [_make_config(*self.interpreted, 1, 1)]  # without a choice nothing is timed
        else:
            configs = [_make_config(*sizes) for group in self.candidates.values() for sizes in group]
        # With do_bench, or Triton 3.3 looks for a GPU as soon as this is imported.
        return triton.autotune(
            configs,
            key=["BLOCK_K", "length_bucket"],
            prune_configs_by={"early_config_prune": self._choose},
            do_bench=triton.testing.do_bench,
        )(kernel)

    def _choose(self, configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
        """Return what suits a call; Triton gives its arguments by name, and the keyword ones again."""
        itemsize, head_dim = (arguments | constants)["q_ptr"].element_size(), constants["BLOCK_K"]
        fitting = [limits for limits in self.candidates if limits[0] == itemsize and head_dim <= limits[1]]
        return [_make_config(*sizes) for sizes in self.candidates[min(fitting)]]


@cache
def with_fixed_tile(kernel: Any) -> Any:
    """Return a tuned kernel that takes the first candidate which the device has room for, and times nothing.

    A tile decides the order of sums, and times differ from process to process. This choice is the same in every
    process, and does not depend on what ``kernel`` itself has chosen.
    """
    fixed = triton.autotune(
        kernel.configs,
        key=kernel.keys,
        prune_configs_by={"early_config_prune": kernel.early_config_prune},
        do_bench=_run_untimed,
    )(kernel.fn)
    fixed.cache_results = False  # TRITON_CACHE_AUTOTUNING would give it what another process has timed
    return fixed


def _run_untimed(call: Callable[[], None], quantiles: Sequence[float]) -> list[float]:
    """Take the place of a benchmark: all tiles are equally fast, and of equal ones the tuner takes the first."""
    call()  # raises if the device has no room for the tile, which the tuner then passes over
    return [0.0] * len(quantiles)


# A tile's rows (queries; of KEY_GRADIENT, keys) are 16 to a warp: with fewer, warps compute the same scores twice. Head
# dimension 256 leaves KEY_GRADIENT no other choice.
FORWARD = Tiles(  # BLOCK_M is the block: its programs have nothing to divide
    interpreted=(64, 32),
    candidates={
        (2, 64): ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 4)),
        (2, 128): ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2)),
        (2, 256): ((128, 64, 8, 2), (128, 32, 8, 2)),
        (4, 128): ((64, 32, 8, 2),),
        (4, 256): ((64, 16, 8, 2),),
    },
)
QUERY_GRADIENT = Tiles(
    interpreted=(32, 64),
    candidates={
        (2, 64): ((128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3)),
        (2, 128): ((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3)),
        (2, 256): ((128, 32, 8, 2), (64, 32, 8, 2)),
        (4, 128): ((32, 32, 8, 2),),
        (4, 256): ((32, 16, 8, 2),),  # with 32 keys it spills 2.5 kB for sm_90
    },
)
KEY_GRADIENT = Tiles(
    interpreted=(32, 32),
    candidates={
        (2, 64): ((64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 3)),
        (2, 128): ((64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2)),
        (2, 256): ((32, 64, 8, 2), (64, 32, 8, 1)),
        (4, 64): ((32, 32, 8, 2),),
        (4, 256): ((16, 32, 8, 1),),
    },
)


def _make_config(block_m: int, block_n: int, num_warps: int, num_stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=num_warps, num_stages=num_stages)
