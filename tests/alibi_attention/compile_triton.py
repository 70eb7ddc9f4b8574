# ruff: noqa: T201 - printing is what this file is for
"""Compile the Triton kernels for sm_90, as an H100 would have them compiled; needs no GPU, but TRITON_INTERPRET unset.

Every tile that is tried in bf16 up to head dimension 128, with a horizon. Prints a line of JSON for each: its kernel
and tile, bytes of shared memory and of registers spilled, whether it multiplies on the matrix units and loads ahead of
them, and what ptxas warns of. Run by test_triton.py: the interpreter, once chosen, stays for a whole process.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from alibi_attention import triton_backward, triton_forward, triton_tiles

HEAD_DIMS = (64, 128)
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
POINTERS = {"norms_ptr": "*fp32", "lse_ptr": "*fp32", "delta_ptr": "*fp32", "slopes_ptr": "*fp32"}
POINTERS |= {"first_keys_ptr": "*i32", "cu_seqlens_ptr": "*i32", "tasks_ptr": "*i32"}
FLOATS = ("softmax_scale", "log2_inverse_eps")
KERNELS = {
    "norms": (triton_forward.key_norms_kernel, None),
    "forward": (triton_forward.forward_kernel, triton_tiles.FORWARD),
    "dq": (triton_backward.query_gradient_kernel, triton_tiles.QUERY_GRADIENT),
    "dk and dv": (triton_backward.key_gradient_kernel, triton_tiles.KEY_GRADIENT),
}


def compile_kernel(kernel, head_dim, tile, *, packed):
    """Compile with a horizon, for bf16."""
    block_m, block_n, num_warps, num_stages = tile
    constants = {"HEAD_DIM": head_dim, "BLOCK_K": head_dim, "BLOCK": triton_tiles.block_tokens(torch.bfloat16)}
    constants |= {"SCAN": triton_tiles.scan_blocks(), "BLOCK_M": block_m, "BLOCK_N": block_n}
    if not packed:
        constants |= {"cu_seqlens_ptr": None, "tasks_ptr": None}
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*bf16")
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    constants = {name: value for name, value in constants.items() if name in signature}
    aligned = [index for index, name in enumerate(kernel.arg_names) if name.endswith("_ptr") or "_stride_" in name]
    source = ASTSource(kernel, signature, constants, {(index,): [["tt.divisibility", 16]] for index in aligned})
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def assemble(ptx):
    """Run ptxas as Triton does, which throws away what it says."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [PTXAS, "-v", "-lineinfo", "--gpu-name=sm_90a", source, "-o", source.with_suffix(".cubin")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def report(job):
    name, head_dim, tile = job
    kernel, tiles = KERNELS[name]
    # Documents in half of the head dimensions: a kernel's loops are the same with and without.
    compiled = compile_kernel(kernel, head_dim, tile, packed=head_dim == HEAD_DIMS[0])
    ptx = compiled.asm["ptx"]
    said = assemble(ptx)
    return {
        "kernel": f"{name}, head dim {head_dim}, {tile}",
        "tiled": tiles is not None,
        "shared_bytes": compiled.metadata.shared,
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill stores", said))),
        "warnings": [
            line for line in said.splitlines() if re.search("warning|C7515|serialized|Performance Loss", line)
        ],
        "wgmma": "wgmma.mma_async" in ptx,
        "load_ahead": "cp.async" in ptx,
    }


if __name__ == "__main__":
    jobs = [
        (name, head_dim, tile)
        for head_dim in HEAD_DIMS
        for name, (_, tiles) in KERNELS.items()
        for tile in (tiles.candidates[2, head_dim] if tiles else [(0, 0, 4, 2)])
    ]
    with ThreadPoolExecutor(2) as pool:
        for line in pool.map(report, jobs):
            print(json.dumps(line), flush=True)
