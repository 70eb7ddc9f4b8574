"""Count the pairs of query and key that a proof of negligible weights keeps, of random inputs or of a trained model.

The horizon of alibi_attention stands beside the threshold of Adaptive Computation Pruning (arXiv:2504.06949), on the
same q and k and for the same share eps of a row's weights; alibi_attention.bench.pruning says how each is read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from alibi_attention import alibi_slopes
from alibi_attention.bench.pruning import KeptPairs, count_kept_pairs
from alibi_attention.bench.timing import Case, make_case_inputs
from megalibi import log
from megalibi.errors import ConfigError
from megalibi.files import write_aside
from megalibi.metrics.provenance import describe_run
from megalibi.runtime.exit import run_tool
from megalibi.runtime.outputs import check_outputs

EXAMPLE = """examples:
  python tools/count_kept_pairs.py --output results/horizon/random.json
  python tools/capture_qk.py --checkpoint runs/quickstart --data sample/valid --length 4096 --output qk.pt
  python tools/count_kept_pairs.py --qk qk.pt --heads 8 --head-dim 32 --output results/horizon/trained.json
"""
NOTES = (
    "pairs: of all heads together, and of each in the order of the heads. causal: j <= i; threshold: what "
    "arXiv:2504.06949 keeps; head_horizon, query_horizon: what our bound keeps with one distance for a head, and for a "
    "query; needed: the fewest nearest keys that hold all but eps of a row."
)
console = Console(soft_wrap=True, highlight=False)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--qk", metavar="FILE", help="q and k of tools/capture_qk.py (default: normal numbers)")
    parser.add_argument("--lengths", default="512,1024,2048,4096", metavar="N,N", help="default: %(default)s")
    parser.add_argument("--heads", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--head-dim", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--eps",
        default="5.960464477539063e-08,4.539992976248485e-05",
        metavar="X,X",
        help="shares of a row that may be left out (default: 2^-24, ours, and exp(-10), theirs)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to write the counts")
    return parser.parse_args()


def parse_shares(text: str) -> list[float]:
    """Return the shares of --eps, the smallest first."""
    try:
        shares = sorted({float(part) for part in text.split(",")})
    except ValueError:
        shares = [0.0]
    if not 0.0 < shares[0] <= shares[-1] < 1.0:
        raise ConfigError(f"--eps={text}: must be numbers between 0 and 1, as in 1e-7,1e-4")
    return shares


def plan_cases(arguments: argparse.Namespace) -> list[Case]:
    """Return the inputs to count, the shortest first."""
    lengths = sorted({int(part) if part.isdecimal() else 0 for part in arguments.lengths.split(",")})
    if lengths[0] < 1:
        raise ConfigError(f"--lengths={arguments.lengths}: must be whole numbers above 0, as in 512,1024")
    for option, value in (("heads", arguments.heads), ("head-dim", arguments.head_dim)):
        if value < 1:
            raise ConfigError(f"--{option}={value}: must be at least 1")
    fixed: dict[str, Any] = {"device": "cpu", "dtype": "float32", "batch": 1, "mode": "forward", "qk": arguments.qk}
    shape = {"num_heads": arguments.heads, "head_dim": arguments.head_dim}
    return [Case(**fixed, **shape, length=length) for length in lengths]


def count(cases: list[Case], shares: list[float]) -> Iterator[dict[str, Any]]:
    """Yield a row of counts for each case and share."""
    for case in cases:
        q, k, *_ = make_case_inputs(case)
        for eps in shares:
            by_head = count_kept_pairs(q, k, alibi_slopes(case.num_heads), horizon_eps=eps)
            pairs = {name: sum(counts) for name, counts in zip(KeptPairs._fields, by_head, strict=True)}
            yield {"length": case.length, "eps": eps, "pairs": pairs, "pairs_by_head": by_head._asdict()}


def describe_counts(row: dict[str, Any]) -> str:
    """Return the line that is printed for a row: shares of the causal pairs."""
    shares = (f"{name} {row['pairs'][name] / row['pairs']['causal']:.3f}" for name in KeptPairs._fields[1:])
    return f"{row['length']:>6} tokens, eps {row['eps']:.1e}: {', '.join(shares)} of the causal pairs"


def main() -> None:
    """Check, count, print and write."""
    arguments = parse_arguments()
    check_outputs({"--output": arguments.output})
    cases, shares, rows = plan_cases(arguments), parse_shares(arguments.eps), []
    try:
        make_case_inputs(cases[-1])
    except ValueError as error:
        raise ConfigError(f"--qk: {error}") from error
    for row in count(cases, shares):
        console.print(describe_counts(row))
        rows.append(row)
    if arguments.output is not None:
        settings = {name: getattr(arguments, name) for name in ("qk", "heads", "head_dim")}
        record = {**describe_run("cpu", ("torch",)), "settings": settings, "notes": NOTES, "rows": rows}
        write_aside(arguments.output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    log.configure()
    run_tool(main)
