"""Evaluate a checkpoint on text at several lengths: loss, perplexity, bits per byte.

Every token but the first is scored once. With --protocol nonoverlapping the text is cut into blocks, and the first
tokens of a block have little context. With --protocol sliding the windows overlap, and each window but the first scores
its last STRIDE tokens, which have at least LENGTH - STRIDE tokens of context.

Several ranks (started by torchrun, deepspeed or srun) share the windows; the result is the same as that of one rank.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from megalibi import log
from megalibi.cli.command import RankCommand
from megalibi.config.checks import check_option
from megalibi.console import Progress
from megalibi.data.provenance import say_unrecorded
from megalibi.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from megalibi.data.tokenizer.words import WordTokenizer
from megalibi.data.tokens.token_file import TokenFile
from megalibi.errors import ConfigError
from megalibi.evaluate.by_position import bin_positions, format_positions, to_columns
from megalibi.evaluate.result import Evaluation, EvaluationResult, write_evaluation
from megalibi.evaluate.run import (
    EvaluationSetup,
    check_and_measure,
    check_lengths,
    check_same_tokenizer,
    check_tensor_parallel_size,
    evaluate,
)
from megalibi.evaluate.slope_scale import check_slope_scale, parse_slope_scale
from megalibi.metrics.provenance import describe_run
from megalibi.report.plots import save_figure
from megalibi.report.position_plot import position_curve
from megalibi.runtime.device import describe_device, set_up_device
from megalibi.runtime.outputs import check_outputs, check_picture
from megalibi.runtime.ranks import Place, join_ranks
from megalibi.units import format_duration

EXAMPLES = """examples:
  {command} --checkpoint runs/quickstart --data sample/valid --lengths 256,512,1024,2048 \\
      --protocol nonoverlapping --output runs/quickstart/evaluation.json
  torchrun --nproc_per_node 8 {torchrun} --checkpoint runs/large --data data/valid --lengths 1024,2048 \\
      --protocol sliding --stride 512 --tensor-parallel-size 2 --by-position --output runs/large/evaluation.json
"""
_LOGGER = log.get_logger("evaluate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="a step's folder, or a run's: its latest step"
    )
    parser.add_argument("--data", required=True, metavar="PREFIX", help="a token file, without .bin and .idx")
    parser.add_argument("--lengths", required=True, metavar="N,N", help="numbers of tokens that the model sees at once")
    parser.add_argument("--protocol", choices=["nonoverlapping", "sliding"], default="nonoverlapping")
    parser.add_argument(
        "--stride", type=int, metavar="S", help="tokens between sliding windows (default: half the shortest length)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .json to write")
    parser.add_argument("--tokens", type=int, metavar="N", help="use the first N tokens of the text (default: all)")
    parser.add_argument(
        "--tokenizer",
        metavar="T.model",
        help="tokenizer of the text, for bits per byte (default: data.tokenizer of the checkpoint)",
    )
    parser.add_argument(
        "--by-position", action="store_true", help="print and write the loss by position in the window, too"
    )
    parser.add_argument(
        "--slope-scale",
        default="none",
        metavar="S",
        help="multiply the slopes of an ALiBi model by S: none (default), interpolate (training length / length where "
        "that is below 1, arXiv:2310.13017) or a number above 0",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the loss by position in the window")
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="ranks that share one model (default: 1)"
    )


def parse_lengths(text: str) -> list[int]:
    """Return the lengths of --lengths in rising order."""
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        lengths = [0]
    if lengths[0] < 1:
        raise ConfigError(f"--lengths={text}: must be whole numbers above 0, as in 512,1024")
    return lengths


def choose_stride(protocol: str, stride: int | None, lengths: list[int]) -> int | None:
    """Return the tokens between windows; None for nonoverlapping ones."""
    if protocol == "nonoverlapping":
        if stride is not None:
            raise ConfigError(
                f"--stride={stride}: must not stand beside --protocol nonoverlapping; leave it out, or choose sliding"
            )
        return None
    if stride is None:
        return max(1, lengths[0] // 2)
    if not 1 <= stride <= lengths[0]:
        raise ConfigError(f"--stride={stride}: must be from 1 to {lengths[0]}, the shortest of --lengths")
    return stride


def count_tokens(text: TokenFile, limit: int | None, lengths: list[int]) -> int:
    """Return how many tokens of the text are used: all of them, or the first ``limit``."""
    check_option("--tokens", limit, 1)
    num_tokens = text.num_tokens if limit is None else min(limit, text.num_tokens)
    if num_tokens <= lengths[-1]:
        used = f"--tokens={limit}" if limit is not None and limit < text.num_tokens else f"{num_tokens} tokens"
        raise ConfigError(f"--lengths={lengths[-1]}: must be below the {used} of {text.bin_path}")
    return num_tokens


def open_tokenizer(given: str | None, of_checkpoint: str | None) -> Tokenizer | WordTokenizer | None:
    """Return the tokenizer of the text; None, with a warning, if it is not there."""
    path = given or of_checkpoint
    if path is None or (given is None and not Path(path).is_file()):
        _LOGGER.warning(
            "bits per byte are left out: the checkpoint's tokenizer, %s, is not there; name one with --tokenizer", path
        )
        return None
    return load_tokenizer(path)


def byte_counter(tokenizer: Tokenizer | WordTokenizer | None) -> Tokenizer | None:
    """Return the tokenizer that counts the bytes of the text; None, with a warning, if none can."""
    if isinstance(tokenizer, Tokenizer) and tokenizer.is_exact:
        return tokenizer
    if tokenizer is not None:
        _LOGGER.warning(
            "bits per byte are left out: %s does not keep texts as they are, so their bytes cannot be counted",
            tokenizer.path,
        )
    return None


def format_result(result: EvaluationResult) -> str:
    """Return the line that is printed for a length."""
    bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f} bits/byte, "
    scaled = "" if result.slope_scale is None else f", slopes x {result.slope_scale:.4g}"
    return (
        f"length {result.length}{scaled}: loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, {bits}"
        f"{result.tokens:,} tokens, {result.tokens_per_second:,.0f} tokens/s, {(result.memory_bytes or 0) / 1e9:.2f} GB"
    )


def show_scored(progress: Progress, length: int, num_scored: int) -> Callable[[int, float], None]:
    """Return what shows how many of the tokens at a length are scored, and their mean loss."""
    start = time.monotonic()
    task = f"length {length}"

    def show(scored: int, loss: float) -> None:
        seconds = time.monotonic() - start
        left = format_duration(seconds * (num_scored / scored - 1)) if scored else "?"
        words = f"{scored / num_scored:.0%}, loss {loss:.4f}, {scored / seconds:,.0f} tokens/s, {left} left"
        progress.show(task, words, done=scored, total=num_scored)

    progress.begin(task)
    return show


def evaluate_lengths(
    setup: EvaluationSetup, lengths: list[int]
) -> tuple[list[EvaluationResult], dict[int, NDArray[np.float64]]]:
    """Evaluate at each length; rank 0 prints each result as soon as it is known.

    Returns:
        The results, and by length the sums by position, [2, S].
    """
    results, sums, speaks = [], {}, setup.groups.world.rank == 0
    with Progress(Console(file=sys.stderr, quiet=not speaks)) as progress:
        for length in lengths:
            result, sums[length] = evaluate(setup, length, show_scored(progress, length, setup.num_tokens - 1))
            results.append(result)
            progress.drop(f"length {length}")
            if speaks:
                print(format_result(result), flush=True)
    return results, sums


def run(arguments: argparse.Namespace, place: Place) -> None:
    """Check everything, evaluate, write the results and print them."""
    lengths = parse_lengths(arguments.lengths)
    stride = choose_stride(arguments.protocol, arguments.stride, lengths)
    slope_scale = parse_slope_scale(arguments.slope_scale)
    text = TokenFile(arguments.data)
    num_tokens = count_tokens(text, arguments.tokens, lengths)
    check_outputs({"--output": arguments.output, "--picture": arguments.picture})
    check_picture(arguments.picture, "--picture")
    device = set_up_device(place)
    # After the device: it imports DeepSpeed.
    from megalibi.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(arguments.checkpoint)
    config, manifest = checkpoint.config, checkpoint.manifest
    check_lengths(config, lengths)
    check_slope_scale(config, slope_scale)
    check_tensor_parallel_size(config, arguments.tensor_parallel_size, place.world_size)
    tokenizer = open_tokenizer(arguments.tokenizer, config.data.tokenizer)
    check_same_tokenizer(manifest.data, text, tokenizer)
    num_bytes = check_and_measure(text, num_tokens, config.model.vocab_size, byte_counter(tokenizer))
    groups = join_ranks(place, device, arguments.tensor_parallel_size, config.parallel.timeout_minutes)
    setup = EvaluationSetup(
        model=checkpoint.load_model(device, groups),
        text=text,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        stride=stride,
        groups=groups,
        device=device,
        train_seq_length=config.data.seq_length,
        slope_scale=slope_scale,
    )
    if place.rank == 0:  # not before: what is wrong with the checkpoint is one line
        say_unrecorded([arguments.data])
    results, sums = evaluate_lengths(setup, lengths)
    if place.rank > 0:
        return
    if arguments.by_position:
        print(format_positions({length: bin_positions(sums_2S) for length, sums_2S in sums.items()}))
        results = [dataclasses.replace(row, by_position=to_columns(sums[row.length])) for row in results]
    evaluation = Evaluation(
        checkpoint=str(checkpoint.path),
        step=manifest.step,
        train_seq_length=config.data.seq_length,
        protocol=arguments.protocol,
        stride=stride,
        data=arguments.data,
        results=tuple(results),
        device=describe_device(device),
        ranks=place.world_size,
        tensor_parallel_size=arguments.tensor_parallel_size,
        **describe_run(str(device)),
    )
    write_evaluation(evaluation, arguments.output)
    if arguments.picture is not None:
        save_figure(position_curve(sums, train_seq_length=config.data.seq_length), arguments.picture)


COMMAND = RankCommand(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
