from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megalibi.metrics.summary import Quartiles
from megalibi.plan.memory_trace import MemoryByKind
from megalibi.studies.comparison.quality import Quality
from megalibi.studies.comparison.report.findings import judge_comparison
from megalibi.studies.comparison.report.page import format_comparison
from megalibi.studies.comparison.results import Results
from megalibi.studies.comparison.speed import Speed
from megalibi.studies.comparison.study import ATTENTIONS, CompareStudy, Variant, variants
from tests.support.paper_comparison import STUDY, empty_results, paper_results

COMMITTED = Path(__file__).parents[4] / "results"


def test_nothing_measured_is_nothing_judged_and_a_page_of_dashes() -> None:
    results = empty_results()
    assert judge_comparison(results) == []
    page = format_comparison(results, facts=["Facts."], picture=None)
    assert "Nothing is measured yet." in page
    assert "| ALiBi, 1,024 | - | - |" in page
    assert not results.has_curves


def test_the_page_says_what_the_papers_11_percent_are_and_has_its_numbers_beside() -> None:
    page = format_comparison(paper_results(), facts=["Facts."], picture="figure5.png")
    assert '"11% faster" is the time to a given perplexity' in page
    assert "which is 13.1% higher: 50.0k against 44.2k" in page
    for caveat in (
        "does not see scratch memory inside native C++",
        "everything on that GPU, other processes too",
        "the first one is a first checkpoint's, and shows the learning rate's warm-up too",
    ):
        assert page.count(caveat) == 1
    assert '"11% less memory" is 26.2 against 29.3 GB, 10.6% less' in page
    assert "![Perplexity against hours of training, ALiBi and sinusoidal positions](figure5.png)" in page
    (row,) = [line for line in page.splitlines() if line.startswith("| ALiBi, 512 | 24.6 | 24.6 |")]
    assert row.endswith("| 9.79 | 9.30 | 9.54 | - | - | *24.6* | *5.5k* | *9.79* | *9.3* | *9.54* |")
    (gains,) = [line for line in page.splitlines() if line.startswith("| ALiBi, 1,024 against") and "*+13.1%*" in line]
    assert gains.count("+13.1% [+13.1%, +13.1%]") == len(ATTENTIONS)
    assert gains.count("10.6% (-)") == len(ATTENTIONS)


def test_other_lengths_have_no_paper_beside() -> None:
    study = dataclasses.replace(STUDY, lengths=(512, 1024))
    page = format_comparison(dataclasses.replace(empty_results(), study=study), facts=[], picture=None)
    assert "*26.2*" not in page


def read_speed(variant: Variant, fields: dict[str, Any]) -> Speed:
    step_seconds = Quartiles(**fields["step_seconds"])
    return Speed(
        variant=variant,
        step_seconds=step_seconds,
        turn_medians=dict(enumerate(fields["turn_median_step_seconds"], start=1)),
        batch_tokens=round(fields["tokens_per_second"] * step_seconds.median),
        memory=MemoryByKind(**fields["memory_bytes"]),
        device_bytes=fields["device_peak_bytes"],
    )


def read_committed(fields: dict[str, Any]) -> Results:
    """The results of a comparison from its results.json."""
    study = CompareStudy(**{**fields["study"], "lengths": tuple(fields["study"]["lengths"])})
    by_name = {variant.name: variant for variant in variants(study)}
    qualities = {}
    for model in study.models():
        if model.name in fields["quality"]:
            known = fields["quality"][model.name]
            perplexities = {
                int(updates): {int(length): perplexity for length, perplexity in by_length.items()}
                for updates, by_length in known["perplexity_by_updates_and_length"].items()
            }
            wall_seconds = known["wall_seconds_of_steps"]
            qualities[model] = Quality(model=model, wall_seconds=wall_seconds, perplexities=perplexities)
    return Results(
        study=study,
        updates=fields["updates"],
        plans={by_name[name]: MemoryByKind(**memory) for name, memory in fields["planned_memory_bytes"].items()},
        speeds={by_name[name]: read_speed(by_name[name], speed) for name, speed in fields["speed"].items()},
        qualities=qualities,
    )


@pytest.mark.parametrize("folder", ["compare_small", "compare_1.3b_plan"])
def test_the_committed_page_is_that_of_the_committed_results(folder: str) -> None:
    results = read_committed(json.loads((COMMITTED / folder / "results.json").read_text()))
    committed = (COMMITTED / folder / "report.md").read_text()
    _, facts, _ = committed.split("\n\n", 2)
    page = format_comparison(results, facts=facts.splitlines(), picture="figure5.png" if results.has_curves else None)
    if folder == "compare_small":
        # It was measured before there was a back end ``unfused``: ATTENTIONS had ``reference`` in its place.
        (now, then) = (f"**unfused** attention, `model.attention_backend={name}`" for name in ("unfused", "reference"))
        assert page.count(now) == committed.count(then) == 1
        page = page.replace(now, then)
    assert page == committed
