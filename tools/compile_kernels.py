"""Compile the Triton kernels ahead of time, without a GPU, and say what ptxas makes of them.

For every tile that may be tried: registers of a thread, bytes that it spills, shared memory of a program, whether sm_90
multiplies with wgmma, and ptxas' warnings, C7515 among them: it waits for each matrix instruction. The kernels have
their horizon and rows of one length, as in ordinary training, or with --packed documents.

--commit compiles the kernels of other commits of this repository beside each other, with the same Triton and ptxas.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from megalibi import log
from megalibi.errors import ConfigError
from megalibi.files import write_aside, write_json
from megalibi.metrics.provenance import describe_run
from megalibi.runtime.exit import run_tool
from megalibi.runtime.outputs import check_outputs

EXAMPLE = r"""examples:
  python tools/compile_kernels.py --arch sm_90
  python tools/compile_kernels.py --arch sm_80 sm_90 --commit e4f2636 HEAD \
    --output results/kernels_compiled/before_and_after.json
"""
ARCHITECTURES = ("sm_80", "sm_90")
DTYPES = ("bfloat16", "float32")
HEAD_DIMS = (64, 128, 256)
POINTERS = {"norms_ptr": "*fp32", "lse_ptr": "*fp32", "delta_ptr": "*fp32", "slopes_ptr": "*fp32"}
POINTERS |= {"first_keys_ptr": "*i32", "cu_seqlens_ptr": "*i32", "tasks_ptr": "*i32"}
FLOATS = ("softmax_scale", "log2_inverse_eps")
ROOT = Path(__file__).parents[1]
COLUMNS = ("registers", "spilled", "shared", "wgmma", "C7515")
_UNTILED = (0, 0, 4, 2)  # no tile, 4 warps, 2 stages
console = Console(soft_wrap=True, highlight=False)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head-dim", nargs="+", type=int, choices=HEAD_DIMS, default=list(HEAD_DIMS))
    parser.add_argument("--packed", action="store_true", help="with packed documents")
    parser.add_argument("--commit", nargs="+", metavar="COMMIT", help="default: the kernels as they lie here")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the rows, and a table beside it: .md")
    parser.add_argument("--rows", action="store_true", help="print a line of JSON for each kernel, and nothing else")
    return parser.parse_args()


class Compilation(NamedTuple):
    """A kernel to compile."""

    arch: str
    dtype: str
    head_dim: int
    packed: bool
    kernel: str
    tile: tuple[int, ...]


def list_jobs(arguments: argparse.Namespace) -> Iterator[Compilation]:
    """Yield every kernel and tile asked for."""
    from alibi_attention.backends.triton import tiles as triton_tiles

    tiles = {"norms": None, "forward": triton_tiles.FORWARD, "dq": triton_tiles.QUERY_GRADIENT}
    tiles["dk and dv"] = triton_tiles.KEY_GRADIENT
    for arch in arguments.arch:
        for dtype in arguments.dtype:
            itemsize = 2 if dtype == "bfloat16" else 4
            for head_dim in arguments.head_dim:
                for name, choice in tiles.items():
                    if choice is None:
                        yield Compilation(arch, dtype, head_dim, arguments.packed, name, _UNTILED)
                        continue
                    fitting = [
                        limits for limits in choice.candidates if limits[0] == itemsize and head_dim <= limits[1]
                    ]
                    for tile in choice.candidates[min(fitting)]:
                        yield Compilation(arch, dtype, head_dim, arguments.packed, name, tile)


def compile_kernel(job: Compilation) -> Any:
    """Return what Triton makes of a kernel, as it would be launched for contiguous inputs."""
    arch, dtype, head_dim, packed, name, tile = job
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from alibi_attention.backends.triton import backward as triton_backward
    from alibi_attention.backends.triton import forward as triton_forward
    from alibi_attention.backends.triton import tiles as triton_tiles

    kernel = {
        "norms": triton_forward.key_norms_kernel,
        "forward": triton_forward.forward_kernel,
        "dq": triton_backward.query_gradient_kernel,
        "dk and dv": triton_backward.key_gradient_kernel,
    }[name]
    block_m, block_n, num_warps, num_stages = tile
    constants: dict[str, int | None] = {
        "HEAD_DIM": head_dim,
        "BLOCK_K": head_dim,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    constants |= {"BLOCK": triton_tiles.block_tokens(getattr(torch, dtype)), "SCAN": triton_tiles.scan_blocks()}
    if not packed:
        constants |= {"cu_seqlens_ptr": None, "tasks_ptr": None}
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    signature, element = {}, "*bf16" if dtype == "bfloat16" else "*fp32"
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = POINTERS.get(argument, element)
        else:
            signature[argument] = "fp32" if argument in FLOATS else "i32"
    constants = {argument: value for argument, value in constants.items() if argument in signature}
    aligned = [i for i, argument in enumerate(kernel.arg_names) if argument.endswith("_ptr") or "_stride_" in argument]
    source = ASTSource(kernel, signature, constants, {(index,): [["tt.divisibility", 16]] for index in aligned})
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options=options)


def find_ptxas() -> Path:
    """Return the assembler that Triton brings."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def assemble(ptx: str, arch: str) -> str:
    """Run ptxas as Triton does, and return what it says, which Triton throws away."""
    name = arch + "a" if arch == "sm_90" else arch
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        cubin = source.with_suffix(".cubin")
        command = [str(find_ptxas()), "-v", "-lineinfo", f"--gpu-name={name}", str(source), "-o", str(cubin)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def make_row(job: Compilation) -> dict[str, Any]:
    """Return a kernel's figures; bytes spilled are those that a thread stores."""
    compiled = compile_kernel(job)
    ptx = compiled.asm["ptx"]
    said = assemble(ptx, job.arch)
    lines = said.splitlines()
    return {
        **job._asdict(),
        "tile": None if job.tile == _UNTILED else list(job.tile),
        "registers": max(map(int, re.findall(r"Used (\d+) registers", said))),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill stores", said))),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": "wgmma.mma_async" in ptx,
        "load_ahead": "cp.async" in ptx,
        "C7515": any("C7515" in line for line in lines),
        "warnings": [line for line in lines if re.search("warning|serialized|Performance Loss", line)],
    }


def print_rows(arguments: argparse.Namespace) -> None:
    """Compile, two kernels at a time, and print rows as they come."""
    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(make_row, list_jobs(arguments)):
            print(json.dumps(row), flush=True)


def compile_elsewhere(source_root: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the kernels in a folder, from a process of their own: without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(source_root), str(ROOT)])
    command = [sys.executable, __file__, "--rows", "--arch", *arguments.arch, "--dtype", *arguments.dtype]
    command += ["--head-dim", *map(str, arguments.head_dim), *(["--packed"] if arguments.packed else [])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"the kernels in {source_root} do not compile: what Triton said stands above")
    return [json.loads(line) for line in done.stdout.splitlines()]


def find_commit(commit: str) -> str:
    """Return a commit's short hash."""
    done = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short=12", f"{commit}^{{commit}}"], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise ConfigError(f"--commit={commit}: is no commit of {ROOT}")
    return done.stdout.strip()


def compile_commits(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return the rows by commit, in the order asked for."""
    if arguments.commit is None:
        return {"here": compile_elsewhere(ROOT / "kernels", arguments)}
    rows = {}
    for commit in [find_commit(commit) for commit in arguments.commit]:
        archive = subprocess.run(["git", "-C", ROOT, "archive", commit, "kernels"], check=True, capture_output=True)
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
                files.extractall(folder, filter="data")
            rows[commit] = compile_elsewhere(Path(folder) / "kernels", arguments)
    return rows


def format_compiled(rows_by_commit: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return a table of all kernels and tiles, the commits' figures beside each other."""
    key = ("arch", "dtype", "head_dim", "kernel", "tile")
    figures: dict[str, dict[str, list[str]]] = {}
    for commit, rows in rows_by_commit.items():
        for row in rows:
            tile = "" if row["tile"] is None else "{} x {}, {} warps, {} stages".format(*row["tile"])
            name = " | ".join(str(row[field]) for field in key[:-1]) + f" | {tile}"
            cells = [str(row["registers"]), str(row["spilled_bytes"]), f"{row['shared_bytes']:,}"]
            cells += ["yes" if row["wgmma"] else "no", "yes" if row["C7515"] else "no"]
            figures.setdefault(name, {})[commit] = cells
    titles = [*key] + [f"{column}, {commit}" for commit in rows_by_commit for column in COLUMNS]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for name in sorted(figures):
        cells = [cell for commit in rows_by_commit for cell in figures[name].get(commit, ["-"] * len(COLUMNS))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile, print, write."""
    arguments = parse_arguments()
    if arguments.rows:
        print_rows(arguments)
        return
    check_outputs({"--output": arguments.output})
    rows_by_commit = compile_commits(arguments)
    table = format_compiled(rows_by_commit)
    console.print(table)
    if arguments.output is not None:
        said = subprocess.run([find_ptxas(), "--version"], check=True, capture_output=True, text=True).stdout
        run = describe_run("cpu", ("torch", "triton"))
        run["versions"]["ptxas"] = re.findall(r"V[\d.]+", said)[0]
        write_json({**run, "rows": rows_by_commit}, arguments.output)
        write_aside(arguments.output.with_suffix(".md"), f"`{run['command']}`\n\n{table}")


if __name__ == "__main__":
    log.configure()
    run_tool(main)
