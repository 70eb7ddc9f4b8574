"""Time attention with ALiBi: our back ends and others', against plain causal attention without a bias, in one run.

All contestants of a case are timed in turns, so that other work of the machine slows them alike, and ratios are taken
within a turn. Every row is written as soon as it is known; a second run with the same --output resumes the first.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from rich.console import Console

from alibi_attention import backends
from alibi_attention.bench.peers import PEERS
from alibi_attention.bench.timing import (
    FORMULA,
    MODES,
    PLAIN,
    Case,
    Contestant,
    find_contestants,
    make_case_inputs,
    measure_call_memory,
    measure_times,
)
from megalibi import log
from megalibi.errors import ConfigError
from megalibi.files import write_aside
from megalibi.measure.other_work import read_load_average
from megalibi.metrics.provenance import describe_run
from megalibi.report.plots import GRID, INK, MUTED, PAPER, SERIES_COLORS, save_figure
from megalibi.runtime.exit import run_tool
from megalibi.runtime.outputs import check_outputs, check_picture

EXAMPLE = r"""examples:
  python tools/benchmark_attention.py --output results/attention_cpu/random.json \
    --picture results/attention_cpu/random.png
  python tools/benchmark_attention.py --dtype bfloat16 --lengths 4096 --backends native,sdpa --peers none
  python tools/capture_qk.py --checkpoint runs/quickstart --data sample/valid --length 4096 --output qk.pt
  python tools/benchmark_attention.py --qk qk.pt --heads 8 --head-dim 32 --lengths 512,4096
"""
DTYPES = ("float32", "bfloat16", "float16")
MARKERS = ("o", "s", "D", "^", "v", "P")
PACKAGES = ("torch", "triton", "flash-attn", "transformers")
"""Packages whose versions a record names."""
NOTES = (
    "seconds of one call; ratio_to_plain: divided by plain's seconds of the same turn; low and high are quartiles. "
    "memory_bytes: the most that a call holds beyond q, k, v and the upstream gradient; bias, masks, output and "
    "gradients are counted. Building a bias or a mask is not timed."
)
console = Console(soft_wrap=True, highlight=False)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    ours, others = ",".join(backend.name for backend in backends()), ",".join(peer.name for peer in PEERS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=here)
    parser.add_argument(
        "--dtype", default="float32,bfloat16", help="of float32,bfloat16,float16 (default: %(default)s)"
    )
    parser.add_argument(
        "--lengths", default="512,1024,2048,4096,8192,16384", metavar="N,N", help="default: %(default)s"
    )
    parser.add_argument("--heads", default="8", metavar="N,N", help="default: %(default)s")
    parser.add_argument("--head-dim", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--modes", default=",".join(MODES), help="default: %(default)s")
    parser.add_argument("--backends", metavar="NAMES", help=f"of {ours}; default: all but what an interpreter runs")
    parser.add_argument("--peers", metavar="NAMES", help=f"of {others}, or none; default: all that are installed")
    parser.add_argument("--qk", metavar="FILE", help="q and k of a trained model, from tools/capture_qk.py")
    parser.add_argument("--cuda-graph", action="store_true", help="time captured CUDA graphs: no time of the host")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write rows there, and go on from what it has")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the ratios")
    return parser.parse_args()


def parse_numbers(option: str, text: str) -> list[int]:
    """Return whole numbers above 0 in rising order."""
    numbers = sorted({int(part) if part.isdecimal() else 0 for part in text.split(",")})
    if numbers[0] < 1:
        raise ConfigError(f"{option}={text}: must be whole numbers above 0, as in 512,1024")
    return numbers


def parse_names(option: str, text: str, known: Sequence[str]) -> list[str]:
    """Return names that a user gave, separated by commas."""
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f"{option}={text}: must be names of {', '.join(known)}, and {name!r} is none of them")
    return names


def check_attention_options(arguments: argparse.Namespace) -> None:
    """Refuse options that cannot be used, before the work."""
    for option, value in (("head-dim", arguments.head_dim), ("batch", arguments.batch), ("repeats", arguments.repeats)):
        if value < 1:
            raise ConfigError(f"--{option}={value}: must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device=cuda: must be cpu here, for torch sees no GPU")
    if arguments.cuda_graph and arguments.device != "cuda":
        raise ConfigError(f"--cuda-graph: must stand beside --device cuda, and the device is {arguments.device}")
    check_outputs({"--output": arguments.output, "--picture": arguments.picture})
    check_picture(arguments.picture, "--picture")


def plan(arguments: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases, short ones first: what takes hours comes last."""
    dtypes = parse_names("--dtype", arguments.dtype, DTYPES)
    modes = parse_names("--modes", arguments.modes, list(MODES))
    heads, lengths = parse_numbers("--heads", arguments.heads), parse_numbers("--lengths", arguments.lengths)
    for length, dtype, num_heads, mode in itertools.product(lengths, dtypes, heads, modes):
        yield Case(
            device=arguments.device,
            dtype=dtype,
            batch=arguments.batch,
            length=length,
            num_heads=num_heads,
            head_dim=arguments.head_dim,
            mode=mode,
            qk=arguments.qk,
            cuda_graph=arguments.cuda_graph,
        )


def choose_names(arguments: argparse.Namespace, contestants: Mapping[str, Contestant]) -> list[str]:
    """Return the names of the contestants, plain attention first."""
    ours, others = [backend.name for backend in backends()], [peer.name for peer in PEERS]
    if arguments.backends is None:
        chosen = [name for name in ours if not contestants[name].by_name_alone]
    else:
        chosen = parse_names("--backends", arguments.backends, ours)
    return [PLAIN, *chosen, *(others if arguments.peers is None else parse_names("--peers", arguments.peers, others))]


def read_record(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the record to add rows to: a new one, or that of --output."""
    settings = {name: getattr(arguments, name) for name in ("device", "batch", "head_dim", "qk", "cuda_graph")}
    record = {**describe_run(arguments.device, PACKAGES), "settings": settings, "notes": NOTES, "flop": FORMULA}
    record |= {"what": {}, "rows": []}
    if arguments.output is None or not arguments.output.exists():
        return record
    try:
        old = json.loads(arguments.output.read_text(encoding="utf-8"))
        settings_before = {"cuda_graph": False, **old["settings"]}
        rows, theirs = old["rows"], {**settings_before, "hardware": old["hardware"], "torch": old["versions"]["torch"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--output={arguments.output}: must be a file that this command wrote ({error!r}); give another name"
        ) from error
    ours = {**settings, "hardware": record["hardware"], "torch": record["versions"]["torch"]}
    for name, value in ours.items():
        if theirs[name] != value:
            raise ConfigError(
                f"--output={arguments.output}: must hold rows of {name}={value}, and holds some of {theirs[name]}"
            )
    made = {name: old[name] for name in ("command", "commit", "date")}
    return {**record, "what": old["what"], "rows": rows, "earlier": [*old.get("earlier", []), made]}


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the fields that no two rows have in common."""
    return tuple(row[name] for name in ("dtype", "heads", "length", "mode", "name"))


def measure_case(case: Case, names: Sequence[str], repeats: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each contestant; plain attention is measured beside them in any case."""
    for name, figures in measure_times(case, names, repeats).items():
        if name in names:
            memory = None if "skipped" in figures else measure_call_memory(case, name)
            row = {"dtype": case.dtype, "heads": case.num_heads, "length": case.length, "mode": case.mode, "name": name}
            yield {**row, **figures, "memory_bytes": memory}


def describe_row(row: Mapping[str, Any]) -> str:
    """Return the line that is printed for a row."""
    case = f"{row['dtype']:<9}{row['heads']:>3} heads {row['length']:>6} {row['mode']:<17}{row['name']:<17}"
    if "skipped" in row:
        return f"{case}not measured: {row['skipped']}"
    low, median, high = (1e3 * row["seconds"][name] for name in ("low", "median", "high"))
    memory = "?" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e6:,.0f}"
    return (
        f"{case}{median:>10,.2f} ms ({low:,.2f} - {high:,.2f}) {row['ratio_to_plain']['median']:>6.2f} x plain "
        f"{row['tflops_per_second']:>8.3f} TFLOP/s {memory:>8} MB"
    )


def write(record: Mapping[str, Any], output: Path | None) -> None:
    """Write the record aside and rename it, so that an interruption loses nothing."""
    if output is None:
        return
    write_aside(output, json.dumps(record, indent=1) + "\n")


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the time ratio to plain attention against length: a panel for each type, head count and mode."""
    measured = [row for row in rows if "skipped" not in row and row["name"] != PLAIN]
    if not measured:
        console.print(f"{path}: nothing to draw, only plain attention was measured")
        return
    groups = sorted({(row["dtype"], row["heads"]) for row in measured})
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in measured)]
    names = list(dict.fromkeys(row["name"] for row in measured))
    figure = Figure(figsize=(3.8 * len(modes), 2.9 * len(groups) + 0.6), layout="constrained")
    panels = figure.subplots(len(groups), len(modes), squeeze=False)
    for (dtype, heads), across in zip(groups, panels, strict=True):
        for mode, axes in zip(modes, across, strict=True):
            shown = [row for row in measured if (row["dtype"], row["heads"], row["mode"]) == (dtype, heads, mode)]
            if not shown:
                axes.set_axis_off()
                continue
            draw_panel(axes, shown, names)
            axes.set_title(f"{mode.replace('_', ' + ')}, {dtype}, {heads} heads", fontsize=9, color=INK)
            handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8, labelcolor=INK)
    save_figure(figure, path)


def draw_panel(axes: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Draw one line for each contestant, ours solid, others' dashed, and plain attention as the level 1."""
    ours = {backend.name for backend in backends()}
    for number, name in enumerate(names):
        points = sorted((row["length"], row["ratio_to_plain"]) for row in rows if row["name"] == name)
        lengths, ratios = [length for length, _ in points], [ratio for _, ratio in points]
        style: dict[str, Any] = {"color": SERIES_COLORS[number % len(SERIES_COLORS)], "label": name}
        style |= {"linestyle": "-" if name in ours else (0, (3, 2)), "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(lengths, [r["median"] for r in ratios], markersize=4, markeredgecolor=PAPER, linewidth=1.6, **style)
        spread = [r["low"] for r in ratios], [r["high"] for r in ratios]
        axes.fill_between(lengths, *spread, color=style["color"], alpha=0.15, linewidth=0)
    axes.axhline(1.0, color=MUTED, linewidth=1.0, zorder=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted({row["length"] for row in rows})))
    axes.xaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("tokens", fontsize=9, color=INK)
    axes.set_ylabel("time / plain causal", fontsize=9, color=INK)
    axes.tick_params(labelsize=8, labelcolor=INK, color=MUTED)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def run_cases(arguments: argparse.Namespace, cases: Sequence[Case], record: dict[str, Any]) -> None:
    """Measure what the record does not have yet, print it, and write it row by row."""
    done = {key_of(row) for row in record["rows"]}
    told: set[tuple[str, str]] = set()
    for case in cases:
        contestants = find_contestants(case.device, case.dtype, case.head_dim)
        names = choose_names(arguments, contestants)
        missing = [name for name in names if (case.dtype, case.num_heads, case.length, case.mode, name) not in done]
        for row in measure_case(case, missing, arguments.repeats) if missing else ():
            record["rows"].append(row)
            record["what"][row["name"]] = contestants[row["name"]].what
            write(record, arguments.output)
            reason = (row["name"], row.get("skipped", ""))
            if reason not in told:  # why somebody is not measured is said once
                console.print(describe_row(row))
            if reason[1]:
                told.add(reason)


def main() -> None:
    """Check, measure, print, write and draw."""
    arguments = parse_arguments()
    check_attention_options(arguments)
    cases, record = list(plan(arguments)), read_record(arguments)
    try:
        for case in cases:
            if case.qk is not None:
                make_case_inputs(case)
    except ValueError as error:
        raise ConfigError(f"--qk: {error}") from error
    run_cases(arguments, cases, record)
    record["load_average_at_the_end"] = read_load_average()
    write(record, arguments.output)
    if arguments.picture is not None:
        draw(record["rows"], arguments.picture)


if __name__ == "__main__":
    log.configure()
    run_tool(main)
