"""Say what a run will take, without a GPU: parameters, arithmetic, memory, communication, the micro batch that fits.

Memory is that of the first rank at the peak of a step. It comes from the model's own code on the meta device and from a
replay of what DeepSpeed allocates; tests compare it with the bytes that real steps hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from megalibi.cli.command import Command, add_overrides
from megalibi.config import Config, config_from_dict, config_to_dict
from megalibi.config.checks import MAX_WHOLE_NUMBER, check_option
from megalibi.config.load import load_tree
from megalibi.errors import ConfigError
from megalibi.files import write_json
from megalibi.metrics.provenance import describe_run
from megalibi.plan.gpus import GIB, USABLE, Gpu, get_gpu
from megalibi.plan.memory_trace import MemoryByKind
from megalibi.runtime.outputs import check_outputs
from megalibi.units import format_bytes

if TYPE_CHECKING:
    from megalibi.plan.roofline import Roofline
    from megalibi.plan.run_plan import RunPlan

EXAMPLES = """examples:
  {command} configs/gpt_1.3b_alibi_1024.yaml --gpu H100 --ranks 8
  {command} configs/gpt_125m_alibi_1024.yaml --gpu V100-32GB zero.stage=2 model.recompute=full
  {command} --roofline configs/gpt_1.3b_alibi_1024.yaml --gpu H100 --ranks 8
"""
TABLE_WIDTH = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a run's YAML, or a study's")
    add_overrides(parser)
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="number of ranks (default: parallel.tensor_parallel_size)"
    )
    parser.add_argument("--gpu", metavar="NAME", help="say what fits this GPU: H100, A100-80GB, V100-32GB, ...")
    parser.add_argument("--gpu-memory-gib", type=float, metavar="G", help="memory of another GPU, or less of this one")
    parser.add_argument(
        "--attention", default="fused", metavar="KIND", help="fused, or unfused: scores written out (default: fused)"
    )
    parser.add_argument("--roofline", action="store_true", help="estimate the time of each part on --gpu, and the MFU")
    parser.add_argument(
        "--rates", default="", metavar="NAME=SHARE,...", help="share of the data sheet's rates that is reached: of "
        "matmul, attention, memory, link (defaults: Rates in megalibi/plan/roofline.py)"
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan to this file, too")


def read_config(arguments: argparse.Namespace) -> Config:
    """Return the configuration of the run; the section ``study`` of a study's file is left out."""
    tree = load_tree(arguments.config, arguments.overrides)
    tree.pop("study", None)
    return config_from_dict(tree)


def choose_gpu(arguments: argparse.Namespace) -> Gpu | None:
    """Return the GPU that the plan is compared with; None: no GPU was asked for."""
    gpu = None if arguments.gpu is None else get_gpu(arguments.gpu)
    if arguments.gpu_memory_gib is None:
        return gpu
    if not 0 < arguments.gpu_memory_gib < MAX_WHOLE_NUMBER / GIB:  # false for NaN
        raise ConfigError(f"--gpu-memory-gib={arguments.gpu_memory_gib:g}: must be a finite number above 0")
    memory_bytes = int(arguments.gpu_memory_gib * GIB)
    if gpu is None:
        return Gpu(name="the GPU", memory_bytes=memory_bytes, peak_flops_per_second=0.0, memory_bytes_per_second=0.0,
                   link_bytes_per_second=0.0, source="--gpu-memory-gib")  # fmt: skip
    return dataclasses.replace(gpu, memory_bytes=memory_bytes)


def tabulate_plan(config: Config, plan: RunPlan) -> Table:
    """Return the plan as a table."""
    table = Table("", "", "", box=None, show_header=False, pad_edge=False)
    parallel, train = config.parallel, config.train
    table.add_row(
        "ranks",
        f"{plan.ranks} = tensor {parallel.tensor_parallel_size} x data {plan.data_parallel_size}",
        f"ZeRO {config.zero.stage}, {train.precision}, recompute {config.model.recompute}",
    )
    per_rank = f"{plan.parameters_per_rank:,} on a tensor rank, padding included"
    table.add_row("parameters", f"{plan.parameters:,}", per_rank)
    samples = (
        f"{train.micro_batch_size} x {plan.data_parallel_size} data ranks x {plan.accumulation_steps} micro batches"
    )
    table.add_row("tokens per step", f"{plan.batch_tokens:,}", f"{config.data.seq_length:,} x {samples}")
    conventions = {
        "full": "attention in full",
        "causal": "attention causal",
        "recomputed": "in full, with recomputation",
    }
    rows = [(f"{getattr(plan.flops, name) / 1e12:,.1f}", words) for name, words in conventions.items()]
    add_rows(table, "TFLOP per step", rows)
    kinds = MemoryByKind.__dataclass_fields__
    rows = [(format_bytes(getattr(plan.memory, kind)), kind.replace("_", " ")) for kind in kinds]
    rows.append((format_bytes(plan.memory.total), "in all, at the peak of a step"))
    add_rows(table, f"memory of a rank, {plan.attention} attention", rows)
    if plan.snapshot_bytes:
        words = "a copy to write checkpoints from (checkpoint.asynchronous=false: none)"
        table.add_row("host memory of a rank, in addition", format_bytes(plan.snapshot_bytes), words)
    rows = [(format_bytes(sent), f"{kind}, by rings") for kind, sent in plan.sent_bytes.items()]
    add_rows(table, "a rank sends per step", rows or [("0 B", "")])
    return table


def add_rows(table: Table, title: str, rows: list[tuple[str, str]]) -> None:
    """Add rows of which the first has a title."""
    for number, (figure, words) in enumerate(rows):
        table.add_row("" if number else title, figure, words)


def describe_fit(plan: RunPlan, gpu: Gpu) -> list[str]:
    """Return the lines about the GPU."""
    largest = plan.largest_micro_batch
    lines = [
        f"{gpu.name}: {gpu.memory_bytes / GIB:.1f} GiB, of which {USABLE:.0%} are planned with: it "
        f"{'fits' if plan.fits else 'does not fit'}",
        f"largest train.micro_batch_size that fits: {largest}"
        if largest
        else "no train.micro_batch_size fits: set model.recompute=full, shorten data.seq_length, raise zero.stage, or "
        "take more ranks with parallel.tensor_parallel_size",
    ]
    if plan.seconds_at_peak is not None:
        lines.append(f"a step takes {plan.seconds_at_peak:.3g} s at the GPUs' peak, and longer in truth")
    return lines


def describe_parts(roofline: Roofline) -> Table:
    """Return the estimate by part as a table."""
    table = Table("an estimate, not measured", box=None, pad_edge=False)
    for head in ("GB", "TFLOP", "ms, estimate", "bound by"):
        table.add_column(head, justify="left" if head == "bound by" else "right")
    moved, flops = (sum(getattr(part, name) for part in roofline.parts) for name in ("bytes", "flops"))
    rows = [(part.name, part.bytes, part.flops, part.seconds, part.bound_by) for part in roofline.parts]
    for name, size, products, seconds, bound_by in [*rows, ("in all", moved, flops, roofline.seconds, "")]:
        table.add_row(name, f"{size / 1e9:,.2f}", f"{products / 1e12:,.2f}", f"{seconds * 1e3:,.2f}", bound_by)
    return table


def describe_roofline(roofline: Roofline) -> list[str]:
    """Return the lines under the table."""
    rates, gpu = dataclasses.asdict(roofline.rates), roofline.gpu
    return [
        "A micro batch of a rank, with its share of the optimizer's step. Nothing overlaps, launches cost nothing.",
        f"Rates: {', '.join(f'{name} {share:g}' for name, share in rates.items())} of {gpu.name}'s "
        f"{gpu.peak_flops_per_second / 1e12:g} TFLOP/s, {gpu.memory_bytes_per_second / 1e12:g} TB/s and "
        f"{gpu.link_bytes_per_second / 1e9:g} GB/s one way ({gpu.source}).",
        f"estimate: {roofline.tokens_per_second:,.0f} tokens/s of all ranks, MFU {roofline.mfu(causal=True):.1%} with "
        f"attention counted causally, {roofline.mfu(causal=False):.1%} in full",
    ]


def run(arguments: argparse.Namespace) -> None:
    """Plan the run, print the plan and write it."""
    config, gpu = read_config(arguments), choose_gpu(arguments)
    ranks = arguments.ranks if arguments.ranks is not None else config.parallel.tensor_parallel_size
    check_option("--ranks", ranks, 1)
    check_outputs({"--json": arguments.json})
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is computed here, and DeepSpeed warns of no GPU
    from megalibi.plan.roofline import check_estimate, estimate, parse_rates
    from megalibi.plan.run_plan import plan_run

    rates = parse_rates(arguments.rates)
    if arguments.roofline:
        check_estimate(config, gpu)
    plan = plan_run(config, ranks, gpu, arguments.attention)
    console = Console(highlight=False, width=TABLE_WIDTH)
    console.print(tabulate_plan(config, plan))
    if plan.replay_note is not None:
        console.print(plan.replay_note, soft_wrap=True)
    for line in describe_fit(plan, gpu) if gpu is not None else ():
        console.print(line, soft_wrap=True)
    roofline = None
    if arguments.roofline and gpu is not None:
        roofline = estimate(config, plan, gpu, rates)
        console.print(describe_parts(roofline))
        for line in describe_roofline(roofline):
            console.print(line, soft_wrap=True)
    if arguments.json is not None:
        fields = {**dataclasses.asdict(plan), "config": config_to_dict(config)}
        fields["memory"]["total"] = plan.memory.total
        if roofline is not None:
            fields["roofline"] = roofline.to_json()
        write_json({**fields, **describe_run("cpu", ("torch", "deepspeed"))}, arguments.json)


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
