"""Measure the data path: preprocessing against bare sentencepiece, and the loader's tokens per second.

Rates are measured in turns and repeated, so that their ratio holds on a machine that does other work, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import sentencepiece
from rich.console import Console

from megalibi import log
from megalibi.config.checks import check_option
from megalibi.data.dataset import open_dataset
from megalibi.data.loader import Loader
from megalibi.data.preprocess import preprocess
from megalibi.data.text.documents import DocumentReader, join_pieces
from megalibi.data.tokens.random_tokens import write_random_tokens
from megalibi.errors import ConfigError
from megalibi.files import write_json
from megalibi.measure.other_work import read_load_average
from megalibi.metrics.provenance import describe_run
from megalibi.runtime.exit import run_tool
from megalibi.runtime.outputs import check_folder, check_outputs

EXAMPLE = """examples:
  python tools/benchmark_data.py preprocess --input books.parquet --tokenizer books.model --workers 2
  python tools/benchmark_data.py loader --gigabytes 4 --output results/data_loader.json
"""
VOCAB_SIZE = 50_000
TOKEN_BYTES = 2
console = Console(stderr=True, soft_wrap=True, highlight=False)


def read_documents(inputs: Sequence[str], text_key: str) -> list[str]:
    """Read whole documents into memory."""
    return [piece.text for piece in join_pieces(DocumentReader(inputs, text_key=text_key))]


def deal(documents: Sequence[str], workers: int) -> list[list[str]]:
    """Share documents out, the longest first, each to the process with the least, so that all end at about one time."""
    shares: list[list[str]] = [[] for _ in range(workers)]
    sizes = [0] * workers
    for document in sorted(documents, key=len, reverse=True):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(document)
        sizes[smallest] += len(document)
    return shares


def serve_bare_encoding(tokenizer_path: str, documents: list[str], connection: Connection) -> None:
    """Encode the documents with sentencepiece alone each time one is asked to; this runs in a process of its own."""
    processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer_path)
    connection.send("ready")
    with contextlib.suppress(EOFError):  # the other end was closed: there is no more to measure
        while connection.recv():
            connection.send(sum(len(processor.encode(document)) for document in documents))


class BareEncoding:
    """As many processes as the preprocessing has, with the documents already in their memory."""

    def __init__(self, tokenizer_path: str, documents: Sequence[str], workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections = []
        for share in deal(documents, workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve_bare_encoding, args=(tokenizer_path, share, theirs), daemon=True)
            process.start()
            self._connections.append(ours)
        for connection in self._connections:
            connection.recv()

    def measure(self) -> float:
        """Return tokens per second over all processes, from the start to the end of the slowest."""
        start = time.perf_counter()
        for connection in self._connections:
            connection.send(True)
        num_tokens = sum(connection.recv() for connection in self._connections)
        return num_tokens / (time.perf_counter() - start)


def cut_documents(documents: Sequence[str], characters: int) -> list[str]:
    """Cut documents into short ones, blindly: sentencepiece is faster on short texts, and so a harder mark."""
    return [
        document[start : start + characters] for document in documents for start in range(0, len(document), characters)
    ]


def benchmark_preprocess(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare tools/preprocess_data.py's work, all of it, with bare encoding."""
    documents = read_documents(arguments.input, arguments.text_key)
    marks = {
        "bare_tokens_per_second": BareEncoding(arguments.tokenizer, documents, arguments.workers),
        "bare_short_tokens_per_second": BareEncoding(
            arguments.tokenizer, cut_documents(documents, 1000), arguments.workers
        ),
    }
    rates: dict[str, list[float]] = {"preprocess_tokens_per_second": [], **{name: [] for name in marks}}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(arguments.repeats):
            start = time.perf_counter()
            final = preprocess(
                arguments.input,
                tokenizer_path=arguments.tokenizer,
                output=f"{folder}/out",
                text_key=arguments.text_key,
                workers=arguments.workers,
                overwrite=True,
            )
            rates["preprocess_tokens_per_second"].append(final.tokens / (time.perf_counter() - start))
            for name, mark in marks.items():
                rates[name].append(mark.measure())
            console.print(f"repeat {repeat + 1} of {arguments.repeats}: {describe_rates(rates, repeat)}")
    ours = rates["preprocess_tokens_per_second"]
    ratios = {
        f"ratio_to_{name.removesuffix('_tokens_per_second')}": [a / b for a, b in zip(ours, rates[name], strict=True)]
        for name in marks
    }
    return {
        "workers": arguments.workers,
        "documents": final.documents,
        "tokens": final.tokens,
        **{name: summarize_repeats(values) for name, values in {**rates, **ratios}.items()},
        "notes": "preprocess: from opening the input to renamed files, start of the worker processes included. bare: "
        "SentencePieceProcessor.encode of whole documents that are in memory, as many processes. bare_short: the same "
        "of documents cut into 1,000 characters, on which sentencepiece is faster. Ratios are taken within a repeat.",
    }


def describe_rates(rates: dict[str, list[float]], repeat: int) -> str:
    """Write one repeat's rates on one line."""
    return ", ".join(
        f"{name.removesuffix('_tokens_per_second')} {values[repeat]:,.0f}" for name, values in rates.items()
    )


def summarize_repeats(values: Sequence[float]) -> dict[str, Any]:
    """Return the median and the spread of repeats."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": list(values)}


def measure_loader(prefix: str, seq_length: int, document_mask: bool, seconds: float, first_step: int) -> float:
    """Return tokens per second of one loader that reads in random order and does nothing else."""
    dataset = open_dataset(prefix, seq_length=seq_length, seed=1, vocab_size=VOCAB_SIZE)
    micro_batch_size = max(8192 // seq_length, 1)
    global_batch_size = 16 * micro_batch_size
    loader = Loader(
        dataset,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        document_mask=document_mask,
    )
    position = first_step * global_batch_size
    num_tokens = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for batch in loader.micro_batches(position):
            num_tokens += batch.tokens.numel()
        position += global_batch_size
    loader.close()
    return num_tokens / elapsed


def benchmark_loader(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the loader on a file of random tokens."""
    num_bytes = int(arguments.gigabytes * 1e9)
    rates: dict[str, list[float]] = {}
    if arguments.folder is not None:
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        console.print(f"writing {num_bytes / 1e9:.1f} GB of random tokens")
        write_random_tokens(Path(folder) / "random", VOCAB_SIZE, num_bytes // TOKEN_BYTES)
        for repeat in range(arguments.repeats):
            for seq_length in arguments.seq_lengths:
                for document_mask in (False, True):
                    name = f"seq_length_{seq_length}{'_document_mask' if document_mask else ''}_tokens_per_second"
                    rate = measure_loader(
                        f"{folder}/random", seq_length, document_mask, arguments.seconds, 1000 * repeat
                    )
                    rates.setdefault(name, []).append(rate)
            console.print(f"repeat {repeat + 1} of {arguments.repeats}: {describe_rates(rates, repeat)}")
    return {
        "file_bytes": num_bytes,
        "processes": 1,
        **{name: summarize_repeats(values) for name, values in rates.items()},
        "notes": "one process, random order, token ids checked and samples hashed; what reads ahead is that process's "
        "one thread. The file was just written: what fits into the page cache comes from there.",
    }


def describe_busy_machine() -> dict[str, Any]:
    """Return what the figures depend on besides the options, and how busy the machine was."""
    described = describe_run("cpu", ("numpy", "sentencepiece"))
    described["hardware"]["load_average_at_the_end"] = read_load_average()
    return described


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    preprocess_ = commands.add_parser("preprocess", help="preprocessing against bare sentencepiece")
    preprocess_.add_argument("--input", nargs="+", required=True, metavar="FILE")
    preprocess_.add_argument("--tokenizer", required=True, metavar="T.model")
    preprocess_.add_argument("--text-key", default="text")
    preprocess_.add_argument("--workers", type=int, default=2)
    loader = commands.add_parser("loader", help="the loader's tokens per second")
    loader.add_argument("--gigabytes", type=float, default=4.0, help="size of the token file (default: 4)")
    loader.add_argument("--seq-lengths", type=int, nargs="+", default=[256, 1024, 2048])
    loader.add_argument("--seconds", type=float, default=5.0, help="length of one measurement (default: 5)")
    loader.add_argument("--folder", help="folder for the token file (default: the system's temporary folder)")
    for command in (preprocess_, loader):
        command.add_argument("--repeats", type=int, default=5)
        command.add_argument("--output", type=Path, metavar="FILE.json", help="where to write the figures")
    return parser.parse_args()


def check_data_options(arguments: argparse.Namespace) -> None:
    """Refuse options that cannot be used, before the work."""
    check_option("--repeats", arguments.repeats, 1)
    check_outputs({"--output": arguments.output})
    if arguments.command == "preprocess":
        check_option("--workers", arguments.workers, 1)
        return
    check_option("--gigabytes", arguments.gigabytes, 0.001)
    check_option("--seconds", arguments.seconds, 0.001)
    for seq_length in arguments.seq_lengths:
        check_option("--seq-lengths", seq_length, 1)
    if max(arguments.seq_lengths) >= arguments.gigabytes * 1e9 / TOKEN_BYTES:
        raise ConfigError(
            f"--seq-lengths={max(arguments.seq_lengths)}: must be below the "
            f"{int(arguments.gigabytes * 1e9) // TOKEN_BYTES} tokens of a file of --gigabytes={arguments.gigabytes}"
        )
    if arguments.folder is not None:
        check_folder(Path(arguments.folder), "--folder")


def main() -> None:
    """Measure, print, and write."""
    arguments = parse_arguments()
    check_data_options(arguments)
    measure = {"preprocess": benchmark_preprocess, "loader": benchmark_loader}[arguments.command]
    figures = measure(arguments)
    for name, value in figures.items():
        if isinstance(value, dict):
            console.print(f"{name}: {value['median']:,.2f} ({value['min']:,.2f} to {value['max']:,.2f})")
    record = {**describe_busy_machine(), **figures}
    if arguments.output:
        write_json(record, arguments.output)
    else:
        print(json.dumps(record, indent=2))


if __name__ == "__main__":
    log.configure()
    run_tool(main)
