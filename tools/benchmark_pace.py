"""Measure what it costs to measure the ranks' pace: pairs of steps of one process, one with it and one without.

Started by a launcher, as a training is. The order within a pair is random and the same on all ranks, so that whatever
else the machine does meets both alike. The figure is the median of the pairs' differences, as a share of the median
step, with a 95% interval by bootstrap over the pairs; the same for the processor time of rank 0, which other processes
disturb less. Where that interval is wider than what is measured, a second figure tells more: the time of the calls
themselves, as many as a step makes, with nothing between them; without the number that rides on the ranks' message.
It computes on CPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megalibi.config import Config, config_from_dict
from megalibi.config.checks import check_option
from megalibi.data.tokens.random_tokens import write_random_tokens
from megalibi.files import write_json
from megalibi.measure.other_work import read_load_average
from megalibi.metrics.provenance import describe_run
from megalibi.runtime.exit import run_rank
from megalibi.runtime.outputs import check_outputs
from megalibi.runtime.ranks import Place

if TYPE_CHECKING:
    import torch

EXAMPLE = """examples:
  torchrun --nproc_per_node 2 tools/benchmark_pace.py --pairs 2000 --output results/pace.json
"""
VOCAB_SIZE = 4096
WARM_UP_PAIRS = 10
CALL_REPEATS = 2000
RESAMPLES = 2000


def build_pace_config(arguments: argparse.Namespace, folder: str, ranks: int) -> Config:
    """Return a run with short steps whose ranks wait for each other in every layer, so that all of them is measured."""
    hidden_size = arguments.hidden_size
    num_heads = ranks * max(hidden_size // (64 * ranks), 1)
    return config_from_dict(
        {
            "model": {"num_layers": arguments.num_layers, "hidden_size": hidden_size, "vocab_size": VOCAB_SIZE,
                      "num_attention_heads": num_heads, "ffn_hidden_size": 4 * hidden_size},
            "data": {"train": f"{folder}/random", "seq_length": arguments.seq_length},
            "optimizer": {"learning_rate": 1e-4},
            "parallel": {"tensor_parallel_size": ranks},
            "train": {"steps": 1_000_000, "global_batch_size": 1, "micro_batch_size": 1, "precision": "fp32",
                      "output_dir": "never-written"},
            "zero": {"stage": 1},
        }
    )  # fmt: skip


class PaceBenchmark:
    """One rank: it takes steps with and without the measuring. All ranks do the same at the same time."""

    def __init__(self, config: Config, place: Place) -> None:
        # The imports stand here because they take seconds, and a mistake in the arguments is said before.
        from megalibi.engine.build import build_engine
        from megalibi.parallel import gather_objects
        from megalibi.train.job import open_loader
        from megalibi.train.pace import Pace
        from megalibi.train.start import start_job

        self.job = job = start_job(config, place)
        self.engine = build_engine(config, job.derived, job.groups, job.device)
        self.loader = open_loader(job)
        train, runtime = config.train, config.runtime
        self.pace = Pace(job.groups, gather_objects(socket.gethostname(), job.groups.world),
                         every_steps=train.log_every_steps, slow_ratio=runtime.slow_rank_ratio,
                         first_step=0)  # fmt: skip
        self.done = 0

    def take_step(self, *, is_measured: bool) -> tuple[float, float]:
        """Take a step as the training loop does; return its seconds, and those of the processor."""
        from megalibi.runtime.stop import read_together
        from megalibi.train.loop import take_step

        job, pace, consumed = self.job, self.pace, self.done * self.job.config.train.global_batch_size
        began, processor_began = time.perf_counter(), time.process_time()
        if is_measured:
            batches = read_together(
                lambda: pace.time_read(lambda: self.loader.micro_batches(consumed)), job.groups, job.device, aside=pace
            )
            take_step(job, self.engine, batches, self.done, forward=pace.forward)
            pace.end_step()
        else:
            batches = read_together(lambda: self.loader.micro_batches(consumed), job.groups, job.device)
            take_step(job, self.engine, batches, self.done)
        self.done += 1
        return time.perf_counter() - began, time.process_time() - processor_began

    def measure(self, pairs: int) -> np.ndarray:
        """Return the seconds of each pair [pair, without and with, wall clock and processor]."""
        rng, seconds = random.Random(0), np.empty((WARM_UP_PAIRS + pairs, 2, 2))
        for pair in range(len(seconds)):
            for kind in rng.sample((0, 1), 2):
                seconds[pair, kind] = self.take_step(is_measured=bool(kind))
        return seconds[WARM_UP_PAIRS:]

    def time_calls(self) -> dict[str, Any]:
        """Return how often a step measures a wait for the tensor group, and the seconds of all its measuring."""
        from megalibi.parallel import Stopwatch

        class CountingStopwatch(Stopwatch):
            spans = 0

            @contextlib.contextmanager
            def running(self, device: torch.device) -> Iterator[None]:
                self.spans += 1
                with super().running(device):
                    yield

        pace, clock, device = self.pace, self.job.groups.tensor.clock, self.job.device
        plain, counting = clock.stopwatch, CountingStopwatch()
        clock.stopwatch = counting
        self.take_step(is_measured=True)
        clock.stopwatch = plain
        seconds = np.empty(CALL_REPEATS)
        for repeat in range(CALL_REPEATS):
            began = time.perf_counter()
            told = pace.time_read(pace.tell)
            with pace.forward.running(device), clock.measuring():
                for _ in range(counting.spans):
                    with clock.stopwatch.running(device):
                        pass
            pace.end_step()
            if told is not None:
                pace.hear([told] * self.job.groups.world.size)
            seconds[repeat] = time.perf_counter() - began
        return {"waits_in_a_step": counting.spans, "seconds_in_a_step": float(np.mean(seconds))}


def summarize_pairs(seconds: np.ndarray) -> dict[str, Any]:
    """Return the share of a step that the measuring takes, with its interval.

    Args:
        seconds: Of each pair, without and with [pair, 2].
    """

    def find_share(pairs: np.ndarray) -> float:
        return float(np.median(pairs[:, 1] - pairs[:, 0]) / np.median(pairs[:, 0]))

    rng, count = np.random.default_rng(0), len(seconds)
    shares = [find_share(seconds[rng.integers(count, size=count)]) for _ in range(RESAMPLES)]
    return {
        "step_seconds": float(np.median(seconds[:, 0])),
        "overhead": find_share(seconds),
        "overhead_interval_95": [float(bound) for bound in np.quantile(shares, (0.025, 0.975))],
    }


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=as_written)
    parser.add_argument("--pairs", type=int, default=2000, help="number of pairs of steps (default: 2000)")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the model (default: 256)")
    parser.add_argument("--num-layers", type=int, default=2, help="of the model (default: 2)")
    parser.add_argument("--seq-length", type=int, default=128, help="tokens of a sample (default: 128)")
    parser.add_argument("--notes", default="", help="what else was going on, for the JSON file")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to write the figures")
    return parser.parse_args()


def benchmark_pace(place: Place) -> None:
    """Measure, and have rank 0 print and write."""
    arguments = parse_arguments()
    for name in ("pairs", "hidden_size", "num_layers", "seq_length"):
        check_option(f"--{name.replace('_', '-')}", getattr(arguments, name), 1)
    check_outputs({"--output": arguments.output})
    # Each rank has its own copy of the same random text.
    with tempfile.TemporaryDirectory() as folder:
        write_random_tokens(Path(folder) / "random", VOCAB_SIZE, 1_000_000)
        benchmark = PaceBenchmark(build_pace_config(arguments, folder, place.world_size), place)
        seconds = benchmark.measure(arguments.pairs)
        calls = benchmark.time_calls()
        benchmark.loader.close()
    if place.rank > 0:
        return
    record = {
        **({"notes": arguments.notes} if arguments.notes else {}),
        **describe_run(str(benchmark.job.device), ("torch", "deepspeed")),
        "ranks": place.world_size,
        "pairs": arguments.pairs,
        "wall_clock": summarize_pairs(seconds[..., 0]),
        "processor_of_rank_0": summarize_pairs(seconds[..., 1]),
        "calls_alone": calls | {"share_of_a_step": calls["seconds_in_a_step"] / float(np.median(seconds[:, 0, 0]))},
    }
    record["hardware"]["load_average_at_the_end"] = read_load_average()
    if arguments.output:
        write_json(record, arguments.output)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    run_rank(benchmark_pace)
