# ruff: noqa: T201 - printing is what this file is for
"""Compile the fused kernels for sm_80 and sm_90, as an A100 and an H100 would have them; needs no GPU.

TRITON_INTERPRET has to be unset. Every kernel in fp32 and in bf16, which is to a compiler as fp16 is; layer norms at
widths up to the largest, with and without all that may be left out. Prints a line of JSON for each: registers of a
thread, bytes spilled, bytes of shared memory, and the widest load. Run by test_compile.py.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_ops import cross_entropy_kernels, layer_norm_kernels

ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}
DTYPES = ("bf16", "fp32")
WIDTHS = (512, 2048, 4096, 8192)
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
IN_DTYPE = ("logits_ptr", "grad_ptr", "x_ptr", "y_ptr", "weight_ptr", "bias_ptr", "total_ptr", "norm_ptr",
            "grad_norm_ptr", "grad_total_ptr")  # fmt: skip
UNALIGNED = ("num_columns", "first_column", "num_rows")


def find_type(name, dtype):
    if name == "labels_ptr":
        return "*i64"
    if name.endswith("_ptr"):
        return f"*{dtype}" if name in IN_DTYPE else "*fp32"
    return "fp32" if name == "epsilon" else "i32"


def compile_kernel(kernel, dtype, architecture, num_warps, constants):
    signature = {n: "constexpr" if n in constants else find_type(n, dtype) for n in kernel.arg_names}
    aligned = [i for i, n in enumerate(kernel.arg_names) if n not in (*UNALIGNED, "epsilon", *constants)]
    source = ASTSource(kernel, signature, constants, {(index,): [["tt.divisibility", 16]] for index in aligned})
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": num_warps})


def assemble(ptx, architecture):
    """Run ptxas as Triton does, which throws away what it says."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [PTXAS, "-v", f"--gpu-name={ARCHITECTURES[architecture]}", source, "-o", source.with_suffix(".cubin")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def report(job):
    name, kernel, num_warps, constants, dtype, architecture = job
    compiled = compile_kernel(kernel, dtype, architecture, num_warps, constants)
    said = assemble(compiled.asm["ptx"], architecture)
    return {
        "kernel": name,
        "dtype": dtype,
        "architecture": architecture,
        "warps": num_warps,
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill stores", said))),
        "shared_bytes": compiled.metadata.shared,
        "load_bytes": max(int(n or 1) * int(bits) // 8 for n, bits in find_loads(compiled.asm["ptx"])),
    }


def find_loads(ptx):
    """Numbers and bits of each load from global memory, as ld.global.v4.b32 has 4 of 32."""
    return re.findall(r"ld\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.b(\d+)", ptx)


def list_jobs():
    kernels = [
        ("reduce rows", cross_entropy_kernels.cross_entropy_reduce_kernel, cross_entropy_kernels.WARPS,
         {"BLOCK": cross_entropy_kernels.BLOCK}),
        ("gradient of rows", cross_entropy_kernels.cross_entropy_gradient_kernel, cross_entropy_kernels.WARPS,
         {"BLOCK": cross_entropy_kernels.BLOCK}),
    ]  # fmt: skip
    for width, all_given in itertools.product(WIDTHS, (True, False)):
        block, num_warps = layer_norm_kernels.find_block(width)
        forward, backward = ({"BLOCK": block} for _ in range(2))
        if not all_given:
            forward |= {"y_ptr": None, "bias_ptr": None}
            backward |= {"grad_total_ptr": None, "grad_biases_ptr": None}
        what = f"of layer norm, width {width}, {'all' if all_given else 'least'} given"
        kernels += [
            (f"forward {what}", layer_norm_kernels.layer_norm_forward_kernel, num_warps, forward),
            (f"backward {what}", layer_norm_kernels.layer_norm_backward_kernel, num_warps, backward),
        ]
    return [(*kernel, dtype, arch) for kernel in kernels for dtype in DTYPES for arch in ARCHITECTURES]


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as pool:
        for line in pool.map(report, list_jobs()):
            print(json.dumps(line), flush=True)
