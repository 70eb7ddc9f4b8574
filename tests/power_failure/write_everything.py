"""Trains, and writes every kind of file that must survive a power failure; test_power_failure.py runs it, logged."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from matplotlib.figure import Figure

from megalibi.data.text.documents import Piece
from megalibi.data.tokenizer.training import train_tokenizer
from megalibi.data.tokenizer.words import count_words
from megalibi.data.tokens.token_file import TokenFileWriter
from megalibi.files import write_json
from megalibi.metrics.jsonl import JsonlWriter
from megalibi.report.plots import save_figure
from tests.support.checkpoints import save_files
from tests.support.jobs import SCRIPT, write_job

STEPS = 6
SAVED_EVERY = 2
"""Divides the number of steps."""
GOING_BACK = (10, 20, 30, 20)
"""The run saves step 30, goes back to 10, and comes to 20 again."""


def mark(name: str) -> None:
    """Say in the log that something has returned."""
    with open(os.environ["FILE_LOG"], "a") as log:
        log.write(f"mark\t{name}\t\n")


def train(disk: Path, elsewhere: Path) -> None:
    config = write_job(
        elsewhere,
        train={"steps": STEPS, "output_dir": str(disk / "runs" / "a")},
        checkpoint={"every_steps": SAVED_EVERY, "keep": 2},
    )
    sys.argv = [str(SCRIPT), "--config", str(config)]
    sys.path.insert(0, str(SCRIPT.parent))  # as Python does for a script, and runpy does not
    runpy.run_path(str(SCRIPT), run_name="__main__")


def main() -> None:
    disk, elsewhere = Path(sys.argv[1]), Path(sys.argv[2])
    training = os.fork()
    if training == 0:
        train(disk, elsewhere)  # ends the process
    if os.waitpid(training, 0)[1] != 0:
        sys.exit("training failed")
    mark("trained")
    lines = JsonlWriter(disk / "runs" / "a" / "metrics.jsonl")
    lines.set_aside_after(STEPS - 1)
    lines.close()
    mark("set aside")
    for step in GOING_BACK:
        save_files(disk / "back" / "checkpoints", step, keep=3)
        mark(f"saved {step}")
    (disk / "data").mkdir()
    for number in range(2):
        with TokenFileWriter(disk / "data" / "a", 100) as writer:
            writer.add_document([number] * 1000)
        mark(f"tokens {number}")
    for number in range(2):
        count_words([Piece(f"words {number}", True)], disk / "vocabularies" / "a.words")
        train_tokenizer(["some words to learn from"] * 100, 280, disk / "vocabularies" / "a.model")
        write_json({"number": number}, disk / "data" / "record.json")
        save_figure(Figure(figsize=(1, 1)), disk / "data" / "figure.png")
        mark(f"files {number}")


if __name__ == "__main__":
    main()
