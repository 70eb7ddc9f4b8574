"""Train a sentencepiece tokenizer on text, or count the words of text that is split into words already."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megalibi.cli.command import Command, add_inputs
from megalibi.data.text.cutting import cut_anywhere, cut_at_spaces
from megalibi.data.text.documents import DocumentReader
from megalibi.data.text.sources import INPUT_HELP
from megalibi.data.tokenizer.tokenizer import load_tokenizer
from megalibi.data.tokenizer.training import train_tokenizer
from megalibi.data.tokenizer.words import SUFFIX, count_words
from megalibi.errors import ConfigError
from megalibi.runtime.outputs import check_outputs

EXAMPLES = """examples:
  {command} --input books.parquet notes.jsonl --vocab-size 32000 --output books.model
  {command} --input wiki.train.tokens --output wikitext103.words
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_inputs(parser, INPUT_HELP)
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="number of token ids (default for T.words: all words)",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="T.model",
        help="the tokenizer to write: T.model by sentencepiece, T.words a word-level vocabulary",
    )
    parser.add_argument("--text-key", default="text", help="column that holds the text (default: text)")
    parser.add_argument(
        "--character-coverage", type=float, default=0.9999, help="share of characters with their own id, 0.98 to 1"
    )
    parser.add_argument(
        "--max-sentences",
        type=int,
        default=200_000,
        metavar="N",
        help="sentences of about 1,000 characters to learn from, drawn at random (default: 200000); bounds the memory",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    parser.add_argument(
        "--skip-bad-records",
        action="store_true",
        help="leave out records without usable text, and list them; without this option the first one is an error",
    )


def check_output(output: str, inputs: list[str], *, overwrite: bool) -> None:
    """Refuse an output that cannot be written, before the work."""
    if os.path.realpath(output) in map(os.path.realpath, inputs):
        raise ConfigError(f"--output={output}: must not be one of the inputs, which would be lost")
    check_outputs({"--output": Path(output)})
    if Path(output).exists() and not overwrite:
        raise ConfigError(f"--output={output}: must not exist yet; choose another name, or replace it with --overwrite")


def run(arguments: argparse.Namespace) -> None:
    """Train the tokenizer, write it, and say what came of it."""
    is_word_level = arguments.output.endswith(SUFFIX)
    check_output(arguments.output, arguments.input, overwrite=arguments.overwrite)
    if not is_word_level and arguments.vocab_size is None:
        raise ConfigError("--vocab-size is missing: give the number of token ids, for example 32000")
    reader = DocumentReader(
        arguments.input,
        text_key=arguments.text_key,
        keep_empty=is_word_level,
        skip_bad_records=arguments.skip_bad_records,
        cut=cut_at_spaces if is_word_level else cut_anywhere,
    )
    learned = None
    if is_word_level:
        count_words(reader, arguments.output, vocab_size=arguments.vocab_size)
    else:
        learned = train_tokenizer(
            (piece.text for piece in reader),
            arguments.vocab_size,
            arguments.output,
            character_coverage=arguments.character_coverage,
            max_sentences=arguments.max_sentences,
        )
    tokenizer = load_tokenizer(arguments.output)
    print(f"{arguments.output}: {tokenizer.vocab_size} ids, sha256 {tokenizer.fingerprint[:16]}")
    for line in (learned and learned.describe(), reader.describe_left_out()):
        if line:
            print(line)


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
