# ruff: noqa: T201 - printing is what this file is for
"""Compile the Triton kernels for sm_90, as an H100 would have them compiled; needs no GPU, but TRITON_INTERPRET unset.

Prints a line of JSON for each kernel: its name, bytes of shared memory, and whether it multiplies on the matrix units
and loads ahead of them. Run by test_triton.py: the interpreter, once chosen, stays for a whole process.
"""

from __future__ import annotations

import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from alibi_attention import triton_backward, triton_forward, triton_tiles

HEAD_DIM = 128
POINTERS = {"norms_ptr": "*fp32", "lse_ptr": "*fp32", "delta_ptr": "*fp32", "slopes_ptr": "*fp32"}
POINTERS |= {"first_keys_ptr": "*i32", "cu_seqlens_ptr": "*i32", "tasks_ptr": "*i32"}
FLOATS = ("softmax_scale", "log2_inverse_eps")
KERNELS = (
    (triton_forward.key_norms_kernel, None),
    (triton_forward.forward_kernel, triton_tiles.FORWARD),
    (triton_backward.query_gradient_kernel, triton_tiles.QUERY_GRADIENT),
    (triton_backward.key_gradient_kernel, triton_tiles.KEY_GRADIENT),
)


def compile_kernel(kernel, tiles, *, packed):
    """Compile with a horizon, for bf16, and the first tiles in the list."""
    block_m, block_n, num_warps, num_stages = tiles.candidates[2, HEAD_DIM][0] if tiles else (0, 0, 4, 2)
    constants = {"HEAD_DIM": HEAD_DIM, "BLOCK_K": HEAD_DIM, "BLOCK": triton_tiles.block_tokens(torch.bfloat16)}
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


if __name__ == "__main__":
    for kernel, tiles in KERNELS:
        compiled = compile_kernel(kernel, tiles, packed=tiles is triton_tiles.FORWARD)
        ptx = compiled.asm["ptx"]
        report = {"shared_bytes": compiled.metadata.shared, "tiled": tiles is not None}
        print(json.dumps({**report, "wgmma": "wgmma.mma_async" in ptx, "load_ahead": "cp.async" in ptx}))
