"""Memory is linear in the number of tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import alibi_attention
from tests.alibi_attention.every_backend.support import (
    HERE,
    S_BY_S,
)

MAX_PEAK_MIB_16384 = 64  # one S x S fp32 matrix of one head would be 1024
MAX_PEAK_MIB_16384_DROPOUT = 160  # some matrices of 256 x 16384; 97 were seen
PEAK_MEMORY = """
import sys, torch
from alibi_attention import attention

def forward_backward(seq_length):
    q, k, v = (torch.randn(1, seq_length, 1, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    arguments = {"backend": sys.argv[1], "dropout_p": float(sys.argv[2])}
    attention(q, k, v, alibi_slopes=torch.tensor([2.0**-8]), **arguments).sum().backward()

def peak_kib():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

forward_backward(512)  # two blocks, which are recomputed: what that imports is no part of it
before = peak_kib()
forward_backward(16384)
print((peak_kib() - before) / 1024)
"""


@pytest.mark.parametrize(
    ("backend", "dropout_p"),
    [
        pytest.param(backend, dropout_p, id=f"{backend.name}-dropout {dropout_p}")
        for backend in HERE
        for dropout_p in ((0.0, 0.1) if backend.dropout else (0.0,))
        if backend.name not in S_BY_S and backend.auto
    ],
)
def test_memory_is_linear_at_16384_tokens(backend, dropout_p):
    source_root = Path(alibi_attention.__file__).parents[1]
    command = [sys.executable, "-c", PEAK_MEMORY, backend.name, str(dropout_p)]
    # A fresh process, since a peak never falls. VmHWM, not ru_maxrss: the latter inherits the parent's peak.
    # Tensors come from mmap: malloc's heap keeps what blocks of many sizes leave behind, 220 to 420 MiB in all.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    done = subprocess.run(command, cwd=source_root, capture_output=True, text=True, check=True, env=environment)
    assert float(done.stdout) < (MAX_PEAK_MIB_16384_DROPOUT if dropout_p else MAX_PEAK_MIB_16384)
