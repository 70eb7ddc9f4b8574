"""Measure checkpoints: save and load against plain files of the same bytes, and how long a save holds the training up.

The ranks are real processes that train a model on random tokens. Everything is measured in turns and repeated, and a
ratio is taken within a repeat. Every write ends with fsync. Before a read the files are dropped from the page cache
with posix_fadvise(POSIX_FADV_DONTNEED), which needs no rights; a disk's or a hypervisor's own cache is out of reach.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console

from megalibi import log
from megalibi.config import Config, config_from_dict
from megalibi.config.checks import check_option
from megalibi.data.tokens.random_tokens import write_random_tokens
from megalibi.errors import JobError
from megalibi.files import sync_file, write_json
from megalibi.measure.other_work import read_load_average
from megalibi.metrics.provenance import describe_run
from megalibi.runtime.exit import run_tool
from megalibi.runtime.outputs import check_folder, check_outputs

EXAMPLE = """examples:
  python tools/benchmark_checkpoint.py bandwidth stall --ranks 2 --output results/checkpoint/ranks_2.json
"""
VOCAB_SIZE = 4096
BLOCK_BYTES = 1 << 24  # as large as the blocks of a save
console = Console(stderr=True, soft_wrap=True, highlight=False)
Figures = dict[str, float]


def build_benchmark_config(arguments: argparse.Namespace, folder: str) -> Config:
    """Return a run whose checkpoint has the size that is asked for, and whose steps are short."""
    hidden_size = arguments.hidden_size
    return config_from_dict(
        {
            "model": {"num_layers": arguments.num_layers, "hidden_size": hidden_size, "vocab_size": VOCAB_SIZE,
                      "num_attention_heads": max(hidden_size // 64, 1), "ffn_hidden_size": 4 * hidden_size},
            "data": {"train": f"{folder}/random", "seq_length": arguments.seq_length},
            "optimizer": {"learning_rate": 1e-4},
            "train": {"steps": 1_000_000, "global_batch_size": arguments.ranks, "micro_batch_size": 1,
                      "precision": "fp32", "output_dir": f"{folder}/run"},
            "zero": {"stage": 1},
        }
    )  # fmt: skip


class BenchmarkRank:
    """One rank: it trains, saves and loads, each as often as it is asked to. All ranks do the same at the same time."""

    def __init__(self, config: Config) -> None:
        # The imports stand here because they take seconds, and the process that starts the ranks needs none.
        import torch.distributed as dist

        from megalibi.checkpoint import CheckpointSaver, SavedRun
        from megalibi.engine.build import build_engine
        from megalibi.runtime.ranks import find_place
        from megalibi.train.job import checkpoints_folder, open_loader
        from megalibi.train.start import start_job

        self.job = start_job(config, find_place(os.environ))
        job = self.job
        self.engine = build_engine(config, job.derived, job.groups, job.device)
        self.loader = open_loader(job)
        self.folder = checkpoints_folder(config)
        run = SavedRun(engine=self.engine, config=config, derived=job.derived, data=job.data.identity,
                       groups=job.groups, folder=self.folder, run_id="benchmark")  # fmt: skip
        self.saver = CheckpointSaver(run)
        self.barrier: Callable[[], Any] = dist.barrier
        self.done = 0
        self.blocked_seconds = 0.0
        self.take_steps(2)

    def take_steps(self, steps: int) -> None:
        """Take so many steps, and go on with a save in flight before each of them, as a training does."""
        from megalibi.train.loop import take_step

        for _ in range(steps):
            self.block(self.saver.poll)
            consumed = self.done * self.job.config.train.global_batch_size
            take_step(self.job, self.engine, self.loader.micro_batches(consumed), self.done)
            self.done += 1

    def block(self, work: Callable[[], Any]) -> None:
        """Do what holds the training up, and count its seconds on this rank."""
        began = time.perf_counter()
        work()
        self.blocked_seconds += time.perf_counter() - began

    def time(self, work: Callable[[], Any]) -> float:
        """Return the seconds from when all ranks begin until all have ended."""
        self.barrier()
        began = time.perf_counter()
        work()
        self.barrier()
        return time.perf_counter() - began

    def measure_bandwidth(self, _steps: int) -> Figures:
        """Write and read the same bytes as plain files and as a checkpoint."""
        import megalibi.checkpoint as checkpoints

        save = self.time(lambda: self.saver.save(self.done))
        path = self.folder / f"step_{self.done:08d}"
        files, rank = checkpoints.read_manifest(path).files, self.job.groups.data.rank
        own = {name: entry.size_bytes for name, entry in files.items() if f"_data_{rank:04d}" in name}
        plain_write = self.time(lambda: write_plain_files(self.folder / f"plain_{rank}", own))
        drop_from_cache(path / name for name in own)
        plain_read = self.time(lambda: read_plain_files(path / name for name in own))
        drop_from_cache(path / name for name in own)
        load = self.time(lambda: checkpoints.load_checkpoint(self.engine, path, self.job.groups))
        self.clean_up()
        total = sum(entry.size_bytes for entry in files.values())
        turns = {"save": save, "plain_write": plain_write, "load": load, "plain_read": plain_read}
        figures = {f"{name}_bytes_per_second": total / seconds for name, seconds in turns.items()}
        figures |= {"save_to_plain_write": plain_write / save, "load_to_plain_read": plain_read / load}
        return {"checkpoint_bytes": total, **figures, "sha256_bytes_per_second": measure_hashing()}

    def measure_stall(self, steps: int) -> Figures:
        """Take steps without a save, with one that is waited for, and with one in the background."""
        without = self.time(lambda: self.take_steps(steps))
        blocked: Figures = {}

        def save_at_once_and_step() -> None:
            self.block(lambda: self.saver.save(self.done))
            self.take_steps(steps)

        def save_and_step() -> None:
            self.block(lambda: self.saver.begin(self.done))
            blocked["copy_seconds"] = self.blocked_seconds
            self.take_steps(steps)
            blocked["still_in_flight"] = float(self.saver.pending_step is not None)
            self.block(self.saver.finish)

        turns: Figures = {}
        for name, work in (("at_once", save_at_once_and_step), ("background", save_and_step)):
            self.blocked_seconds = 0.0
            turns[name] = self.time(work)
            blocked[f"{name}_blocked_seconds"] = self.blocked_seconds
            self.clean_up()
        ratio = blocked["background_blocked_seconds"] / blocked["at_once_blocked_seconds"]
        longer = {f"{name}_turn_longer_by_seconds": seconds - without for name, seconds in turns.items()}
        return {"steps_seconds": without, **blocked, "background_to_at_once_blocked": ratio, **longer}

    def clean_up(self) -> None:
        """Remove what was written."""
        self.barrier()
        if self.job.groups.world.rank == 0:
            shutil.rmtree(self.folder)
        self.barrier()


def write_plain_files(folder: Path, sizes: Mapping[str, int]) -> None:
    """Write files of so many bytes, one after the other, and wait for the disk."""
    folder.mkdir()
    block = os.urandom(BLOCK_BYTES)
    for name, size in sizes.items():
        with (folder / name).open("wb") as file:
            for start in range(0, size, BLOCK_BYTES):
                file.write(memoryview(block)[: size - start])
            sync_file(file)


def read_plain_files(paths: Iterator[Path]) -> None:
    """Read files from their beginning to their end."""
    block = bytearray(BLOCK_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def drop_from_cache(paths: Iterator[Path]) -> None:
    """Have the system forget what it holds of files that are on the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_hashing() -> float:
    """Return the bytes that one core hashes in a second: a save can be no faster on a rank."""
    block, began = os.urandom(BLOCK_BYTES), time.perf_counter()
    digest = hashlib.sha256()
    for _ in range(8):
        digest.update(block)
    return 8 * BLOCK_BYTES / (time.perf_counter() - began)


def serve_rank(config: Config, rank: int, ranks: int, port: int, connection: Connection) -> None:
    """Measure each time one is asked to; this runs in a process of its own."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    benchmark = BenchmarkRank(config)
    connection.send(str(benchmark.job.device))
    with contextlib.suppress(EOFError):  # the other end was closed: there is no more to measure
        while True:
            command, steps = connection.recv()
            connection.send(getattr(benchmark, f"measure_{command}")(steps))


class BenchmarkRanks:
    """The ranks of the benchmark."""

    def __init__(self, config: Config, ranks: int) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.connections = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve_rank, args=(config, rank, ranks, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
        devices = [self._receive(connection) for connection in self.connections]
        self.device: str = devices[0]

    def measure(self, command: str, steps: int) -> Figures:
        """Have all ranks measure, and return what rank 0 says."""
        for connection in self.connections:
            connection.send((command, steps))
        figures: list[Figures] = [self._receive(connection) for connection in self.connections]
        return figures[0]

    @staticmethod
    def _receive(connection: Connection) -> Any:
        try:
            return connection.recv()
        except EOFError:
            raise JobError("a rank of the benchmark has failed: see the lines above") from None


def summarize_figures(repeats: Sequence[Figures]) -> dict[str, Any]:
    """Return the median and the spread of each figure over the repeats."""
    columns = {name: [figures[name] for figures in repeats] for name in repeats[0]}
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": values}
        for name, values in columns.items()
    }


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=as_written)
    parser.add_argument("measures", nargs="+", choices=("bandwidth", "stall"), help="what to measure")
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks (default: 1)")
    parser.add_argument("--hidden-size", type=int, default=1024, help="of the model (default: 1024)")
    parser.add_argument("--num-layers", type=int, default=10, help="of the model (default: 10: 1.6 GB on the disk)")
    parser.add_argument("--seq-length", type=int, default=64, help="tokens of a sample, for long or short steps")
    parser.add_argument("--steps", type=int, default=8, help="of each turn of stall (default: 8)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="folder on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to write the figures")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write."""
    arguments = parse_arguments()
    for name in ("ranks", "hidden_size", "num_layers", "seq_length", "steps", "repeats"):
        check_option(f"--{name.replace('_', '-')}", getattr(arguments, name), 1)
    check_outputs({"--output": arguments.output})
    if arguments.folder is not None:
        check_folder(Path(arguments.folder), "--folder")
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        write_random_tokens(Path(folder) / "random", VOCAB_SIZE, 1_000_000)
        ranks = BenchmarkRanks(build_benchmark_config(arguments, folder), arguments.ranks)
        figures: dict[str, Any] = {}
        for name in arguments.measures:
            figures |= summarize_figures([ranks.measure(name, arguments.steps) for _ in range(arguments.repeats)])
    for name, value in figures.items():
        console.print(f"{name}: {value['median']:,.3f} ({value['min']:,.3f} to {value['max']:,.3f})")
    record = {**describe_run(ranks.device, ("torch", "deepspeed")), "ranks": arguments.ranks, **figures}
    record["hardware"]["load_average_at_the_end"] = read_load_average()
    if arguments.output:
        write_json(record, arguments.output)
    else:
        print(json.dumps(record, indent=2))


if __name__ == "__main__":
    log.configure()
    run_tool(main)
