"""Tokenize text into a token file (Megatron-LM's .bin and .idx), and note in PREFIX.json how it was made."""

from __future__ import annotations

import argparse
import os
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from megalibi import log
from megalibi.data.preprocess import Progress, preprocess
from megalibi.data.text.estimate import estimate_text_bytes
from megalibi.data.text.sources import INPUT_HELP
from megalibi.runtime.exit import run_tool

EXAMPLE = """example:
  python tools/preprocess_data.py --input books.parquet --tokenizer books.model --output data/books --workers 8
"""
LINE_EVERY_SECONDS = 10.0


class Display:
    """Progress with tokens per second and the time left: a bar on a terminal, plain lines elsewhere.

    Args:
        text_bytes: What there is to read, as far as that is known.
        console: Where to show it.
    """

    def __init__(self, text_bytes: int | None, console: Console) -> None:
        self._text_bytes = text_bytes
        self._console = console
        self._start = time.monotonic()
        self._next_line = self._start + LINE_EVERY_SECONDS
        columns = (BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
        self._bar = Bar(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task("", total=text_bytes, state="starting")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, progress: Progress) -> None:
        """Show what has been written so far."""
        now = time.monotonic()
        state = self._describe(progress, now - self._start)
        # The sizes of compressed files are guesses: never show more than all.
        completed = min(progress.text_bytes, self._text_bytes or progress.text_bytes)
        self._bar.update(self._task, completed=completed, state=state)
        if not self._console.is_terminal and now >= self._next_line:
            self._console.print(state, highlight=False, soft_wrap=True)
            self._next_line = now + LINE_EVERY_SECONDS

    def _describe(self, progress: Progress, seconds: float) -> str:
        state = (
            f"{progress.documents:,} documents, {progress.tokens:,} tokens, {progress.tokens / seconds:,.0f} tokens/s"
        )
        if self._text_bytes is None:
            return f"{state}, time left unknown"
        fraction = min(progress.text_bytes / self._text_bytes, 1.0)
        left = seconds * (1 / fraction - 1) if fraction else 0.0
        return f"{state}, {fraction:.0%}, about {left:,.0f} s left"


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help=INPUT_HELP,
    )
    parser.add_argument("--tokenizer", required=True, metavar="T.model", help="a sentencepiece model, or T.words")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx, PREFIX.json")
    parser.add_argument("--text-key", default="text", help="column that holds the text (default: text)")
    parser.add_argument(
        "--text-unit",
        choices=["document", "line", "paragraph"],
        default="document",
        help="what is one document in a .txt or .tokens file: all of it (default), a line, or a paragraph",
    )
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument(
        "--workers", type=int, default=num_cores, metavar="N", help="encoding processes (default: one a core)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing token file")
    parser.add_argument(
        "--skip-bad-records",
        action="store_true",
        help="count and list the records whose text cannot be had, and go on; without it the first one is an error",
    )
    return parser.parse_args()


def main() -> None:
    """Tokenize, and say what came of it."""
    arguments = parse_arguments()
    start = time.monotonic()
    with Display(estimate_text_bytes(arguments.input, arguments.text_key), Console(file=sys.stderr)) as display:
        final = preprocess(
            arguments.input,
            tokenizer_path=arguments.tokenizer,
            output=arguments.output,
            text_key=arguments.text_key,
            text_unit=arguments.text_unit,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            skip_bad_records=arguments.skip_bad_records,
            report=display.update,
        )
    seconds = time.monotonic() - start
    print(
        f"{arguments.output}: {final.documents:,} documents, {final.tokens:,} tokens "
        f"in {seconds:.1f} s ({final.tokens / seconds:,.0f} tokens/s)"
    )


if __name__ == "__main__":
    log.configure()
    run_tool(main)
