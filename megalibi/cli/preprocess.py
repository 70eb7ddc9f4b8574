"""Tokenize text into a token file (Megatron-LM's .bin and .idx), and note in PREFIX.json how it was made."""

from __future__ import annotations

import argparse
import os
import time

from megalibi.cli.command import Command, add_inputs
from megalibi.console import Progress
from megalibi.data.preprocess import Written, preprocess
from megalibi.data.text.estimate import estimate_text_bytes
from megalibi.data.text.sources import INPUT_HELP

EXAMPLES = """example:
  {command} --input books.parquet --tokenizer books.model --output data/books --workers 8
"""


class Display:
    """Shows how far the preprocessing is, with tokens per second and the time left.

    Args:
        text_bytes: Size of the text to read in bytes; None: not known.
        progress: Where to show it.
    """

    def __init__(self, text_bytes: int | None, progress: Progress) -> None:
        self._text_bytes = text_bytes
        self._progress = progress
        self._start = time.monotonic()
        progress.begin("")

    def update(self, written: Written) -> None:
        """Show what has been written so far."""
        words = self._describe(written, time.monotonic() - self._start)
        # The sizes of compressed files are guesses; the bar never shows more than all.
        self._progress.show("", words, done=written.text_bytes, total=self._text_bytes)

    def _describe(self, written: Written, seconds: float) -> str:
        state = f"{written.documents:,} documents, {written.tokens:,} tokens, {written.tokens / seconds:,.0f} tokens/s"
        if self._text_bytes is None:
            return f"{state}, time left unknown"
        fraction = min(written.text_bytes / self._text_bytes, 1.0)
        left = seconds * (1 / fraction - 1) if fraction else 0.0
        return f"{state}, {fraction:.0%}, about {left:,.0f} s left"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_inputs(parser, INPUT_HELP)
    parser.add_argument("--tokenizer", required=True, metavar="T.model", help="a sentencepiece model, or T.words")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx, PREFIX.json")
    parser.add_argument("--text-key", default="text", help="column that holds the text (default: text)")
    parser.add_argument(
        "--text-unit",
        choices=["document", "line", "paragraph"],
        default="document",
        help="what one document is in a .txt or .tokens file: the whole file (default), a line, or a paragraph",
    )
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument(
        "--workers",
        type=int,
        default=num_cores,
        metavar="N",
        help="processes that encode text (default: one for each core)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing token file")
    parser.add_argument(
        "--skip-bad-records",
        action="store_true",
        help="leave out records without usable text, and list them; without this option the first one is an error",
    )


def run(arguments: argparse.Namespace) -> None:
    """Turn the text into tokens, and say what came of it."""
    start = time.monotonic()
    with Progress() as progress:
        display = Display(estimate_text_bytes(arguments.input, arguments.text_key), progress)
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


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
