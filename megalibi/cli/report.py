"""Write a report about one or several runs: one HTML page that needs nothing else."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalibi.metrics.outputs import check_folder, check_outputs
from megalibi.report.page import PICTURES, REPORT_FILE, write_pictures, write_report
from megalibi.runtime.exit import run_tool

EXAMPLE = """\
examples:
  python tools/report.py runs/quickstart
  python tools/report.py runs/alibi runs/sinusoidal --output comparison.html
"""


def main() -> None:
    """Parse the command line, write the page, print its path."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder (its train.output_dir)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"default: RUN/{REPORT_FILE}; for several runs ./{REPORT_FILE}"
    )
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write the figures as PNG files there, too")
    args = parser.parse_args()
    output = args.output or (args.runs[0] / REPORT_FILE if len(args.runs) == 1 else Path(REPORT_FILE))
    check_outputs({"--output": args.output})
    if args.pictures is not None:
        check_folder(args.pictures, "--pictures", files=PICTURES)
        for path in write_pictures(args.runs, args.pictures):
            print(path)
    print(write_report(args.runs, output))


if __name__ == "__main__":
    run_tool(main)
