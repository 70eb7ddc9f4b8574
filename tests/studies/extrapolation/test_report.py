from __future__ import annotations

import json
import re
from pathlib import Path

from megalibi.studies.extrapolation.findings import judge_extrapolation
from megalibi.studies.extrapolation.positions import spread_positions
from megalibi.studies.extrapolation.report import find_published, format_extrapolation, nearest_train_length
from megalibi.studies.extrapolation.study import PROTOCOLS
from megalibi.studies.extrapolation.sweep import Sweep

COMMITTED = Path(__file__).parents[3] / "results" / "extrapolation_small"


def test_the_papers_nearest_row_is_at_the_same_multiple() -> None:
    assert [nearest_train_length(length) for length in (64, 256, 700, 1024, 8192)] == [512, 512, 512, 1024, 3072]
    assert find_published("alibi", "nonoverlapping", 2.0, 512) == (1012, 18.73)
    assert find_published("alibi", "nonoverlapping", 16.0, 512) == (8512, 18.34)
    assert find_published("alibi", "sliding", 4.0, 512) == (2048, 18.28)
    assert find_published("alibi", "sliding", 16.0, 512) is None
    assert find_published("none", "nonoverlapping", 2.0, 512) is None


SWEEP = Sweep(losses={0.001: 4.0})
INSIDE = Sweep(losses={0.001: 5.0, 0.002: 4.0, 0.004: 5.0})


def test_the_page_has_every_number_with_the_papers_beside() -> None:
    curves = {1: {p: {"sinusoidal": {256: 50.0, 512: 123456.0}, "none": {256: 40.25}} for p in PROTOCOLS}}
    page = format_extrapolation(
        curves,
        judge_extrapolation(curves, 256, {"sinusoidal": INSIDE}),
        by_position={},
        sweeps={"sinusoidal": SWEEP, "none": SWEEP},
        train_length=256,
        stride=64,
        facts=["Facts."],
    )
    rows = [line for line in page.splitlines() if re.match(r"\| [\d,]+ \(", line)]
    assert rows == [
        "| 256 (1 x) | 50.00 | 40.25 | 512 (1 x) | 20.05 |",
        "| 512 (2 x) | 1.23e+05 | - | 1,012 (1.98 x) | 43.54 |",
        "| 256 (1 x) | 50.00 | 40.25 | 512 (1 x) | 18.35 |",
        "| 512 (2 x) | 1.23e+05 | - | 1,024 (2 x) | 204.42 |",
    ]
    assert "| yes | sinusoidal positions explode past the training length |" in page
    assert "Its ALiBi trained at 256: 21.29 at 256" in page
    assert "so only the shapes can be compared" in page
    assert "| sinusoidal | **4.0000** | 0.001 |" in page


def test_several_seeds_stand_as_their_mean_and_their_ends() -> None:
    seeds = {seed: {p: {"alibi": {256: 50.0 + seed, 512: 49.0}} for p in PROTOCOLS} for seed in (0, 1, 5)}
    page = format_extrapolation(
        seeds,
        judge_extrapolation(seeds, 256, {"alibi": INSIDE}),
        by_position={},
        sweeps={"alibi": SWEEP},
        train_length=256,
        stride=64,
        facts=[],
    )
    assert page.count("| 256 (1 x) | 52.00 (50.00 to 55.00) | 512 (1 x) |") == 2
    assert page.count("| 512 (2 x) | 49.00 | 1,") == 2


def test_interpolated_slopes_are_a_column_beside_alibi_and_losses_by_position_a_section() -> None:
    curves = {
        1: {p: {"alibi_interpolated": {256: 50.0, 512: 49.5}, "alibi": {256: 50.0, 512: 49.0}} for p in PROTOCOLS}
    }
    columns = {"seen": [128, 256], "loss": [4.5, 4.0], "tokens": [1, 1]}
    page = format_extrapolation(
        curves,
        [],
        by_position=spread_positions({1: {"alibi": {256: columns}}}, 256),
        sweeps={"alibi": SWEEP},
        train_length=256,
        stride=64,
        facts=[],
    )
    heads = "| tokens | ALiBi | ALiBi interpolated | paper's tokens | *ALiBi* |"
    assert page.count(heads) == 2
    assert page.count("| 512 (2 x) | 49.00 | 49.50 | 1,0") == 2
    assert "## Loss by tokens seen\n\n| tokens seen | predictions | ALiBi |" in page


def read_tables(page: str) -> list[str]:
    """Return the rows and captions of the two tables of perplexities."""
    begin, end = page.index("## Nonoverlapping"), page.index("## What the paper found")
    return page[begin:end].splitlines()


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    """The committed results are of the first form of the study: one learning rate, one seed, no sweep."""
    results = json.loads((COMMITTED / "results.json").read_text())
    curves = {
        results["config"]["train"]["seed"]: {
            protocol: {method: {row["length"]: row["perplexity"] for row in rows} for method, rows in methods.items()}
            for protocol, methods in results["results"].items()
        }
    }
    train_length = results["config"]["data"]["seq_length"]
    page = format_extrapolation(
        curves,
        [],
        by_position={},
        sweeps={"alibi": SWEEP},
        train_length=train_length,
        stride=results["study"]["stride"],
        facts=[],
    )
    assert read_tables(page) == read_tables((COMMITTED / "table.md").read_text())
