"""Measure how many tokens per second rows of text give that are generated together, against one row alone.

The model has the random weights of a configuration and computes in fp32; prompts and tokens are random. Each repeat
takes all sizes of a batch in turn, so that a busy machine slows them alike; seconds of the processor tell what the work
itself takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megalibi import log
from megalibi.config import load_config
from megalibi.config.checks import check_option
from megalibi.files import write_json
from megalibi.generate.decoder import Decoder, feed_each
from megalibi.measure.other_work import read_load_average
from megalibi.metrics.provenance import describe_run
from megalibi.model import GPT, initialize
from megalibi.parallel import ALONE, WHOLE
from megalibi.runtime.exit import run_tool
from megalibi.runtime.outputs import check_outputs

EXAMPLE = """example:
  python tools/benchmark_batches.py --config configs/books_24m_alibi.yaml --output results/generate/batches.json
"""


def measure_rows(model: GPT, rows: Sequence[list[int]], num_prompt: int) -> tuple[float, float]:
    """Return tokens per second, and per second of the processor, of rows that are continued together."""
    decoders = [Decoder(model) for _ in rows]
    for decoder, tokens in zip(decoders, rows, strict=True):
        decoder.feed(tokens[:num_prompt])
    start, start_processor = time.perf_counter(), time.process_time()
    for position in range(num_prompt, len(rows[0])):
        feed_each(decoders, [tokens[position] for tokens in rows])
    count = len(rows) * (len(rows[0]) - num_prompt)
    return count / (time.perf_counter() - start), count / (time.process_time() - start_processor)


def describe_repeats(values: Sequence[float]) -> dict[str, Any]:
    """Return the median of repeats and their spread."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": list(values)}


def measure_batches(model: GPT, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the figures of each size of a batch; ratios are those to a single row in the same repeat."""
    sizes, shape = [1, *arguments.batch_sizes], (max(arguments.batch_sizes), arguments.prompt_tokens + arguments.tokens)
    rows = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(1)).tolist()
    rates = [
        [measure_rows(model, rows[:size], arguments.prompt_tokens) for size in sizes] for _ in range(arguments.repeats)
    ]
    results = []
    for column, size in enumerate(sizes):
        row: dict[str, Any] = {"batch_size": size}
        for kind, name in enumerate(("tokens_per_second", "tokens_per_processor_second")):
            row[name] = describe_repeats([repeat[column][kind] for repeat in rates])
            row[f"{name}_to_one_row"] = describe_repeats([repeat[column][kind] / repeat[0][kind] for repeat in rates])
        results.append(row)
    return results


def format_batch_table(results: Sequence[dict[str, Any]]) -> str:
    """Return the figures as a table in Markdown."""

    def spread(value: dict[str, Any]) -> str:
        return f"{value['median']:.1f} ({value['min']:.1f} to {value['max']:.1f})"

    names = ("tokens_per_second", "tokens_per_second_to_one_row", "tokens_per_processor_second_to_one_row")
    lines = [
        "| rows | tokens/s | against one row | against one row, per second of the processor |",
        "|---|---|---|---|",
    ]
    lines += [f"| {row['batch_size']} | " + " | ".join(spread(row[name]) for name in names) + " |" for row in results]
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="the configuration of the model")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[4, 16], metavar="N", help="beside 1 (default: 4 16)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="of each row (default: 128)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="that continue each row (default: 64)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="of all sizes in turn (default: 7)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to write the figures; a .md beside it")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write."""
    arguments = parse_arguments()
    for name in ("prompt_tokens", "tokens", "repeats"):
        check_option("--" + name.replace("_", "-"), getattr(arguments, name), 1)
    for size in arguments.batch_sizes:
        check_option("--batch-sizes", size, 1)
    check_outputs({"--output": arguments.output})
    config = load_config(arguments.config).model
    model = GPT(config, padded_vocab_size=config.vocab_size, layout=WHOLE)
    initialize(model, seed=1, group=ALONE)
    results = measure_batches(model.requires_grad_(False).eval(), arguments)
    record = describe_run("cpu", ("torch",))
    record["hardware"]["load_average_at_the_end"] = read_load_average()
    record |= {"threads": torch.get_num_threads(), "results": results}
    print(format_batch_table(results) if arguments.output else json.dumps(record, indent=2))
    if arguments.output:
        write_json(record, arguments.output)
        arguments.output.with_suffix(".md").write_text(format_batch_table(results), encoding="utf-8")


if __name__ == "__main__":
    log.configure()
    run_tool(main)
