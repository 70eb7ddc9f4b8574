"""Write a report about one or several runs: one HTML page that needs nothing else."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalibi.cli.command import Command
from megalibi.report.page import PICTURES, REPORT_FILE, write_pictures, write_report
from megalibi.runtime.outputs import check_folder, check_outputs

EXAMPLES = """\
examples:
  {command} runs/quickstart
  {command} runs/alibi runs/sinusoidal --output comparison.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder (its train.output_dir)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"default: RUN/{REPORT_FILE}; for several runs ./{REPORT_FILE}"
    )
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write the figures as PNG files there, too")


def run(arguments: argparse.Namespace) -> None:
    """Write the page and the pictures, and print their paths."""
    output = arguments.output or (arguments.runs[0] / REPORT_FILE if len(arguments.runs) == 1 else Path(REPORT_FILE))
    check_outputs({"--output": arguments.output})
    if arguments.pictures is not None:
        check_folder(arguments.pictures, "--pictures", files=PICTURES)
        for path in write_pictures(arguments.runs, arguments.pictures):
            print(path)
    print(write_report(arguments.runs, output))


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
