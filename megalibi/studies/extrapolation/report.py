"""The page of an extrapolation study in Markdown: our perplexities with the paper's nearest ones beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from megalibi.report.markdown import format_page, format_table
from megalibi.studies import paper
from megalibi.studies.extrapolation.positions import PositionCurves, format_position_curves
from megalibi.studies.extrapolation.spread import Spread, spread_curves
from megalibi.studies.extrapolation.study import (
    METHOD_NAMES,
    NONOVERLAPPING,
    PROTOCOLS,
    SLIDING,
    SeedCurves,
)
from megalibi.studies.extrapolation.sweep import Sweep, format_sweeps
from megalibi.studies.finding import Finding, format_findings

NEAREST_RATIO = 1.5
"""A row of the paper stands beside one of ours if their multiples of the training length differ by at most this
factor."""


def nearest_train_length(train_length: int) -> int:
    """Return the training length of the paper's extrapolation tables whose ratio to ours is nearest to 1."""
    return min(paper.EXTRAPOLATION_TABLES, key=lambda length: abs(math.log(length / train_length)))


def find_published(method: str, protocol: str, multiple: float, train_length: int) -> tuple[int, float] | None:
    """Return the paper's evaluation length nearest to a multiple of its training length, and the perplexity there.

    Args:
        method: A position method.
        protocol: nonoverlapping or sliding.
        multiple: Evaluation length over training length.
        train_length: Tokens that the paper's model was trained at.

    Returns:
        Length and perplexity, or None where the paper has no number within NEAREST_RATIO.
    """
    curve = paper.extrapolation(method, train_length, protocol)
    distances = {length: abs(math.log(length / (multiple * train_length))) for length in curve}
    near = {length: distance for length, distance in distances.items() if distance <= math.log(NEAREST_RATIO)}
    if not near:
        return None
    length = min(near, key=lambda length: near[length])
    return length, curve[length]


def format_extrapolation(
    curves: SeedCurves,
    findings: Sequence[Finding],
    *,
    by_position: PositionCurves,
    sweeps: Mapping[str, Sweep],
    train_length: int,
    stride: int,
    facts: Sequence[str],
) -> str:
    """Return the Markdown page of a study.

    Args:
        curves: Perplexities by seed, protocol and position method.
        findings: From judge_extrapolation.
        by_position: From spread_positions; without curves the page has no losses by position.
        sweeps: The sweep of each method.
        train_length: Tokens that the models were trained at.
        stride: Tokens between the starts of two windows of sliding evaluation.
        facts: Sentences on what was trained and scored.
    """
    titles = {
        NONOVERLAPPING: "Nonoverlapping: blocks, each token scored once",
        SLIDING: f"Sliding: each window scores its last {stride} tokens, the first all of its own",
    }
    least = train_length - stride
    caveat = (
        f"Sliding at {train_length:,} tokens scores tokens with {least:,} to {train_length - 1:,} others before them; "
        "longer windows give them more; the paper's stride of 1 gives every token a full window."
    )
    sections: list[tuple[str, Iterable[str]]] = [("# Train short, test long", [*facts, "", caveat])]
    sections += [("## Learning rates", format_sweeps(sweeps))]
    spreads = spread_curves(curves)
    sections += [(f"## {titles[p]}", _table(spreads[p], p, train_length)) for p in PROTOCOLS]
    if by_position:
        sections += [("## Loss by tokens seen", format_position_curves(by_position, train_length))]
    return format_page([*sections, ("## What the paper found, and what came out here", format_findings(findings))])


def _table(curves: Mapping[str, Mapping[int, Spread]], protocol: str, train_length: int) -> Iterator[str]:
    methods = [method for method in METHOD_NAMES if method in curves]
    paper_length = nearest_train_length(train_length)
    quoted = [method for method in methods if paper.extrapolation(method, paper_length, protocol)]
    heads = [
        "tokens",
        *(METHOD_NAMES[method] for method in methods),
        "paper's tokens",
        *(f"*{METHOD_NAMES[method]}*" for method in quoted),
    ]
    rows = []
    for length in sorted({length for curve in curves.values() for length in curve}):
        multiple = length / train_length
        ours = [_spread_cell(curves[method].get(length)) for method in methods]
        theirs = [find_published(method, protocol, multiple, paper_length) for method in quoted]
        where = sorted({found[0] for found in theirs if found is not None})
        place = ", ".join(f"{place:,} ({place / paper_length:.3g} x)" for place in where) or "-"
        rows.append([f"{length:,} ({multiple:.3g} x)", *ours, place, *(_cell(found and found[1]) for found in theirs)])
    yield from format_table(heads, rows, left=0)
    yield ""
    yield _caption(quoted, protocol, train_length, paper_length)


def _cell(perplexity: float | None) -> str:
    return "-" if perplexity is None else f"{perplexity:,.2f}" if perplexity < 1e5 else f"{perplexity:.2e}"


def _spread_cell(spread: Spread | None) -> str:
    if spread is None:
        return _cell(None)
    if spread.low == spread.high:
        return _cell(spread.mean)
    return f"{_cell(spread.mean)} ({_cell(spread.low)} to {_cell(spread.high)})"


def _caption(quoted: Sequence[str], protocol: str, train_length: int, paper_length: int) -> str:
    same_length = ""
    if protocol == NONOVERLAPPING:
        source = paper.get_table(paper.EXTRAPOLATION_TABLES[paper_length]).source
        same_length = _same_length(train_length)
    else:
        tables = sorted(paper.SLIDING_TABLES[method] for method in quoted)
        source = f"{paper.SOURCE}, Table {', '.join(map(str, tables))}, stride 1"
    return (
        f"Perplexity. In italics the paper's: 247 M parameters trained on WikiText-103 at {paper_length} tokens, "
        f"its row nearest to the same multiple of the training length ({source}). Another text, tokenizer, model and "
        f"length than here ({train_length:,}), so only the shapes can be compared.{same_length}"
    )


def _same_length(train_length: int) -> str:
    """Quote the paper's ALiBi model of our training length, if there is one."""
    table = paper.get_table(5)
    try:
        row = table.row(method="alibi", train_length=train_length)
    except KeyError:
        return ""
    cells = [
        f"{row[name]:.2f} at {int(name):,}" for name in table.columns if name.isdecimal() and row[name] is not None
    ]
    return f" Its ALiBi trained at {train_length:,}: {', '.join(cells)} ({table.source})."
