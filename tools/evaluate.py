"""Evaluate a checkpoint on text at several lengths: loss, perplexity, bits per byte.

Every token but the first is scored once. nonoverlapping: the text is cut into blocks, and a block's first tokens have
little context. sliding: windows overlap and each scores its last STRIDE tokens, which have LENGTH - STRIDE tokens of
context or more (but for the first window).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import shlex
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import megalibi
from megalibi import log
from megalibi.config import ConfigError
from megalibi.config.cli import run_tool
from megalibi.data.token_file import TokenFile, check_ids
from megalibi.data.tokenizer import Tokenizer
from megalibi.engine.evaluate import stream_loss
from megalibi.report import memory_peak_bytes
from megalibi.report.run import EvaluationResult

EXAMPLE = """example:
  python tools/evaluate.py --checkpoint runs/quickstart --data sample/valid --lengths 256,512,1024,2048 \\
      --protocol nonoverlapping --output runs/quickstart/evaluation.json
"""
LINE_EVERY_SECONDS = 10.0
CHECK_TOKENS = 1 << 20
_LOGGER = log.get_logger("evaluate")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="a step's folder, or a run's: its latest step"
    )
    parser.add_argument("--data", required=True, metavar="PREFIX", help="a token file, without .bin and .idx")
    parser.add_argument("--lengths", required=True, metavar="N,N", help="tokens that the model sees at once")
    parser.add_argument("--protocol", choices=["nonoverlapping", "sliding"], default="nonoverlapping")
    parser.add_argument(
        "--stride", type=int, metavar="S", help="tokens between sliding windows (default: half the shortest length)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .json to write")
    parser.add_argument("--tokens", type=int, metavar="N", help="use the first N tokens of the text (default: all)")
    parser.add_argument(
        "--tokenizer", metavar="T.model", help="for bits per byte (default: data.tokenizer of the checkpoint)"
    )
    return parser.parse_args()


def parse_lengths(text: str) -> list[int]:
    """Return the lengths in rising order."""
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        lengths = [0]
    if lengths[0] < 1:
        raise ConfigError(f"--lengths={text} is not allowed: whole numbers above 0 are, as in 512,1024")
    return lengths


def choose_stride(protocol: str, stride: int | None, lengths: list[int]) -> int | None:
    """Return the tokens between windows; None for nonoverlapping ones."""
    if protocol == "nonoverlapping":
        if stride is not None:
            raise ConfigError(f"--stride={stride} does not go with --protocol nonoverlapping: leave it out, or slide")
        return None
    if stride is None:
        return max(1, lengths[0] // 2)
    if not 1 <= stride <= lengths[0]:
        raise ConfigError(f"--stride={stride} is not allowed: from 1 to the shortest of --lengths, {lengths[0]}, is")
    return stride


def count_tokens(text: TokenFile, limit: int | None, lengths: list[int]) -> int:
    """Return how many tokens of the text are used."""
    num_tokens = text.num_tokens if limit is None else min(limit, text.num_tokens)
    if num_tokens <= lengths[-1]:
        used = f"--tokens={limit} of it" if limit is not None and limit < text.num_tokens else "it"
        raise ConfigError(
            f"{text.bin_path} is too short: {used} has {num_tokens} tokens, and --lengths {lengths[-1]} needs "
            f"{lengths[-1] + 1} or more"
        )
    return num_tokens


def open_tokenizer(given: str | None, of_checkpoint: str | None) -> Tokenizer | None:
    """Return what counts the bytes of the text; None, said in a line, if that is not possible."""
    path = given or of_checkpoint
    if path is None or (given is None and not Path(path).is_file()):
        _LOGGER.warning("no bits per byte: the tokenizer of the checkpoint is %s; --tokenizer names one", path)
        return None
    tokenizer = Tokenizer(path)
    if not tokenizer.is_exact:
        _LOGGER.warning("no bits per byte: %s does not keep texts as they are, so their bytes cannot be counted", path)
        return None
    return tokenizer


def check_and_measure(text: TokenFile, num_tokens: int, vocab_size: int, tokenizer: Tokenizer | None) -> int | None:
    """Check every token that will be used, and return the bytes of text of those that are scored."""
    num_bytes = 0
    for start in range(0, num_tokens, CHECK_TOKENS):
        tokens = text.read(start, min(CHECK_TOKENS, num_tokens - start))
        check_ids(tokens, vocab_size, text, start)
        if tokenizer is not None:
            check_ids(tokens, tokenizer.vocab_size, text, start)
            num_bytes += int(tokenizer.text_bytes[tokens].sum())
    if tokenizer is None:
        return None
    return num_bytes - int(tokenizer.text_bytes[text.read(0, 1)].sum())  # the first token is not scored


class Display:
    """Progress with tokens per second: a bar on a terminal, plain lines elsewhere.

    Args:
        length: What is evaluated.
        num_scored: Tokens to score.
        console: Where to show it.
    """

    def __init__(self, length: int, num_scored: int, console: Console) -> None:
        self._length, self._num_scored, self._console = length, num_scored, console
        self._start = time.monotonic()
        self._next_line = self._start + LINE_EVERY_SECONDS
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"))
        self._bar = Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True
        )
        self._task = self._bar.add_task(f"length {length}", total=num_scored, rate="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, scored: int, loss: float) -> None:
        """Show how many tokens are scored, and their mean loss."""
        now = time.monotonic()
        rate = f"loss {loss:.4f}, {scored / (now - self._start):,.0f} tokens/s"
        self._bar.update(self._task, completed=scored, rate=rate)
        if not self._console.is_terminal and now >= self._next_line:
            done = f"length {self._length}: {scored / self._num_scored:.0%}, {rate}"
            self._console.print(done, highlight=False, soft_wrap=True)
            self._next_line = now + LINE_EVERY_SECONDS


def evaluate(
    model: nn.Module,
    text: TokenFile,
    length: int,
    stride: int | None,
    num_tokens: int,
    num_bytes: int | None,
    device: torch.device,
) -> EvaluationResult:
    """Score the text at one length."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    loss_sum, scored, start = 0.0, 0, time.perf_counter()
    with Display(length, num_tokens - 1, Console(file=sys.stderr)) as display:
        for batch_loss_sum, batch_scored in stream_loss(model, text, length, stride, num_tokens, device=device):
            loss_sum, scored = loss_sum + batch_loss_sum, scored + batch_scored
            display.update(scored, loss_sum / scored)
    loss = loss_sum / scored
    if not math.isfinite(loss):
        raise ConfigError(f"the loss at length {length} is {loss}: the checkpoint's model does not compute numbers")
    return EvaluationResult(
        length=length,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # beyond, it is no floating point number
        bits_per_byte=loss_sum / math.log(2) / num_bytes if num_bytes else None,
        tokens=scored,
        tokens_per_second=scored / (time.perf_counter() - start),
        memory_bytes=memory_peak_bytes(device),
    )


def describe(result: EvaluationResult) -> str:
    """Return the line that is printed for a length."""
    bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f} bits/byte, "
    return (
        f"length {result.length}: loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, {bits}"
        f"{result.tokens:,} tokens, {result.tokens_per_second:,.0f} tokens/s, {(result.memory_bytes or 0) / 1e9:.2f} GB"
    )


def set_up_device() -> torch.device:
    """Return the GPU, or the CPU with all its cores."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed, which the checkpoint's reader imports, warns of no GPU
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return torch.device("cpu")


def check_output(output: Path) -> None:
    """Make the output's folder; find out before the work that the file can be written there."""
    if output.is_dir():
        raise ConfigError(f"--output={output} is a folder: give the name of a file, such as evaluation.json")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output={output} cannot be written: {error.strerror}") from error
    if not os.access(output.parent, os.W_OK):
        raise ConfigError(f"--output={output} cannot be written: its folder is read-only")


def write(evaluation: dict[str, Any], output: Path) -> None:
    """Write the file aside and rename it."""
    aside = output.with_name(output.name + ".tmp")
    try:
        aside.write_text(json.dumps(evaluation, indent=1) + "\n", encoding="utf-8")
        aside.replace(output)
    except OSError as error:
        raise ConfigError(f"--output={output} cannot be written: {error.strerror}") from error


def main() -> None:
    """Check everything, evaluate, write, and say what came of it."""
    arguments = parse_arguments()
    lengths = parse_lengths(arguments.lengths)
    stride = choose_stride(arguments.protocol, arguments.stride, lengths)
    text = TokenFile(arguments.data)
    num_tokens = count_tokens(text, arguments.tokens, lengths)
    check_output(arguments.output)
    device = set_up_device()
    from megalibi.checkpoint import get_checkpoint, load_model, read_manifest  # after the device: it imports DeepSpeed

    checkpoint = get_checkpoint(arguments.checkpoint)
    manifest = read_manifest(checkpoint)
    tokenizer = open_tokenizer(arguments.tokenizer, manifest.config["data"]["tokenizer"])
    num_bytes = check_and_measure(text, num_tokens, manifest.config["model"]["vocab_size"], tokenizer)
    model = load_model(checkpoint, device)
    results = []
    for length in lengths:
        results.append(evaluate(model, text, length, stride, num_tokens, num_bytes, device))
        print(describe(results[-1]), flush=True)
    evaluation = {
        "checkpoint": str(checkpoint),
        "step": manifest.step,
        "train_seq_length": manifest.config["data"]["seq_length"],
        "protocol": arguments.protocol,
        "stride": stride,
        "data": arguments.data,
        "results": [dataclasses.asdict(result) for result in results],
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": {
            "megalibi": megalibi.__version__,
            "torch": version("torch"),
            "python": platform.python_version(),
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write(evaluation, arguments.output)


if __name__ == "__main__":
    log.configure()
    run_tool(main)
