"""Train a sentencepiece tokenizer on text, or count the words of text that is split into words already."""

from __future__ import annotations

import argparse

from megalibi import log
from megalibi.config import ConfigError
from megalibi.config.cli import run_tool
from megalibi.data.text import iterate_pieces
from megalibi.data.tokenizer import load_tokenizer, train_tokenizer
from megalibi.data.words import SUFFIX, count_words

EXAMPLE = """example:
  python tools/train_tokenizer.py --input books.parquet notes.jsonl --vocab-size 32000 --output books.model
  python tools/train_tokenizer.py --input wiki.train.tokens --output wikitext103.words
"""


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
        help=".txt, .tokens, .json, .jsonl, .csv, .parquet (also .gz), a folder, a hub name ORG/NAME[:CONFIG][@SPLIT]",
    )
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
        "--character-coverage", type=float, default=0.9999, help="share of characters with their own id"
    )
    parser.add_argument(
        "--max-sentences",
        type=int,
        default=200_000,
        metavar="N",
        help="sentences of about 1,000 characters to learn from, drawn at random (default: 200000); bounds the memory",
    )
    return parser.parse_args()


def main() -> None:
    """Train, write, and say what came of it."""
    arguments = parse_arguments()
    is_word_level = arguments.output.endswith(SUFFIX)
    pieces = iterate_pieces(arguments.input, text_key=arguments.text_key, keep_empty=is_word_level)
    if is_word_level:
        count_words(pieces, arguments.output, vocab_size=arguments.vocab_size)
    elif arguments.vocab_size is None:
        raise ConfigError("--vocab-size is missing: a number of token ids, 32000 for example")
    else:
        train_tokenizer(
            (piece.text for piece in pieces),
            arguments.vocab_size,
            arguments.output,
            character_coverage=arguments.character_coverage,
            max_sentences=arguments.max_sentences,
        )
    tokenizer = load_tokenizer(arguments.output)
    print(f"{arguments.output}: {tokenizer.vocab_size} ids, sha256 {tokenizer.fingerprint[:16]}")


if __name__ == "__main__":
    log.configure()
    run_tool(main)
