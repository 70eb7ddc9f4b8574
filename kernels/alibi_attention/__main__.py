# ruff: noqa: T201 - printing is what this file is for
"""The back ends of this installation: what each can do, and how exact it is here."""

from __future__ import annotations

import argparse
import datetime
import platform
import re
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch

from alibi_attention.attention import backends
from alibi_attention.backend import Call, Capability
from alibi_attention.bench.contract import (
    HEAD_DIM,
    INTERPRETED_LENGTHS,
    LENGTHS,
    Row,
    format_contract,
    is_interpreted,
    measure_contract,
    measure_type,
)

README = Path(__file__).with_name("README.md")
START, END = "<!-- contract: begin -->", "<!-- contract: end -->"
EXAMPLE = """examples:
  python -m alibi_attention
  python -m alibi_attention --contract --lengths 97,1025 --backends sdpa,reference
  TRITON_INTERPRET=1 python -m alibi_attention --contract --write-readme      (a CPU runs the Triton kernel, slowly)
"""
_COLUMNS = ("back end", "devices", "types", "head dim", "dropout", "documents", "horizon", "error", "of plain")
_QUICK_LENGTH = 257
_LEGEND = f"""
error: the largest ||x - x64|| / ||x64|| of output, dq, dk and dv over the heads of models of 8, 12 and 20 heads,
head dimension {HEAD_DIM}, on {{device}} at {_QUICK_LENGTH} tokens ({INTERPRETED_LENGTHS[0]} in an interpreter).
of plain: divided by the error of PyTorch's causal attention without a bias in the same type. --contract measures more.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of back ends, or measure the contract."""
    options = _parse(arguments)
    try:
        capabilities = _choose(options.backends)
        lengths = _parse_lengths(options.lengths)
        if options.write_readme and not (README.exists() and START in README.read_text(encoding="utf-8")):
            raise ValueError(f"--write-readme: {README} must have the line {START}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not options.contract:
        _print_overview(capabilities, options.device)
        return 0
    text = _describe_contract(capabilities, lengths, options.device)
    if options.write_readme:
        _write_readme(text)
        print(f"written: {README}", file=sys.stderr)
    print(text)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m alibi_attention",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--contract", action="store_true", help="measure every back end, type and length against fp64")
    parser.add_argument(
        "--lengths", default=",".join(map(str, LENGTHS)), metavar="N,N", help="tokens (default: %(default)s)"
    )
    parser.add_argument("--backends", metavar="NAME,NAME", help="default: all that are usable")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help=argparse.SUPPRESS,
    )
    parser.add_argument("--write-readme", action="store_true", help="put the contract into this package's README.md")
    return parser.parse_args(arguments)


def _choose(names: str | None) -> list[Capability]:
    """Return the back ends asked for."""
    by_name = {capability.name: capability for capability in backends()}
    chosen = names.split(",") if names else list(by_name)
    for name in chosen:
        if name not in by_name:
            raise ValueError(f"--backends={names}: each name must be one of {', '.join(by_name)}, got {name!r}")
    return [by_name[name] for name in chosen]


def _parse_lengths(text: str) -> list[int]:
    lengths = sorted({int(part) if part.isdecimal() else 0 for part in text.split(",")})
    if lengths[0] < 1:
        raise ValueError(f"--lengths={text}: must be whole numbers above 0, as in 97,1025")
    return lengths


def _print_overview(capabilities: Sequence[Capability], device: str) -> None:
    """Print one line for each back end and type with its measured error, then what each says of its exactness."""
    lines: list[Sequence[str]] = [_COLUMNS]
    for capability in capabilities:
        lines += _overview_lines(capability, device) if capability.usable else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(_LEGEND.format(device=device))
    for capability in capabilities:
        said = capability.exactness if capability.usable else f"not usable: {capability.reason}"
        print(textwrap.fill(f"{capability.name}: {said}", 118, subsequent_indent="    "))


def _overview_lines(capability: Capability, device: str) -> Iterator[Sequence[str]]:
    """Yield a line for each type; what does not depend on the type stands on the first line only."""
    name, devices = capability.name, ", ".join(capability.devices)
    head_dim = "any" if capability.max_head_dim is None else f"<= {capability.max_head_dim}"
    can = {True: "yes", False: "no"}
    rest = [head_dim, can[capability.dropout], capability.cu_seqlens, can[capability.horizon]]
    length = INTERPRETED_LENGTHS[0] if is_interpreted(capability, device) else _QUICK_LENGTH
    for dtype in capability.dtypes:
        error, ratio = "not here", ""
        if capability.find_refusal(Call(device, dtype, HEAD_DIM)) is None:
            error = "refused"
            for row in measure_type([capability], dtype, length, device):
                error, ratio = f"{max(row.errors):.1e}", f"{row.ratio:.2f}"
        yield (name, devices, str(dtype).removeprefix("torch."), *rest, error, ratio)
        name, devices, rest = "", "", [""] * len(rest)


def _describe_contract(capabilities: Sequence[Capability], lengths: Sequence[int], device: str) -> str:
    """Measure, with progress on stderr, and return the table below a description of what it depends on."""
    rows: list[Row] = []
    start = time.monotonic()
    for row in measure_contract(capabilities, lengths, device):
        rows.append(row)
        seconds = time.monotonic() - start
        print(
            f"{seconds:5.0f} s  {row.backend} {row.dtype} {row.length} tokens: ratio {row.ratio:.2f}",
            file=sys.stderr,
            flush=True,
        )
    measured = {row.backend for row in rows}
    lines = [
        f"Measured with `{_command()}` on {_hardware(device)}; {_versions()}; {datetime.date.today().isoformat()}."
    ]
    if not torch.cuda.is_available():
        lines.append("No GPU has been reached: nothing here was measured on one.")
    lines += [
        f"Not measured: `{capability.name}` ({capability.reason or 'it does not run on ' + device})."
        for capability in capabilities
        if capability.name not in measured
    ]
    return "\n".join([*lines, "", format_contract(rows)])


def _command() -> str:
    interpreted = any(is_interpreted(backend, "cpu") for backend in backends())
    interpreter = "TRITON_INTERPRET=1 " if interpreted else ""
    return f"{interpreter}{' '.join(['python', '-m', 'alibi_attention', *sys.argv[1:]])}"


def _hardware(device: str) -> str:
    if device == "cuda":
        return f"one {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.machine()} ({instructions}), {threads}"


def _versions() -> str:
    packages = {"torch": torch.__version__, "python": platform.python_version()}
    for name in ("triton", "flash-attn"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _write_readme(text: str) -> None:
    """Replace what stands between the markers."""
    readme = README.read_text(encoding="utf-8")
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
