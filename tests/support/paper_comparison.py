"""The paper's numbers on its 1.3B models, as if a comparison had measured them."""

from __future__ import annotations

import dataclasses
from typing import Any

from megalibi.metrics.summary import Quartiles
from megalibi.plan.memory_trace import MemoryByKind
from megalibi.studies.comparison.quality import Quality
from megalibi.studies.comparison.results import Results
from megalibi.studies.comparison.speed import Speed
from megalibi.studies.comparison.study import ATTENTIONS, ComparedModel, CompareStudy, Variant, variants
from megalibi.studies.paper import get_curves, get_table

STUDY = CompareStudy(lengths=(512, 1024, 2048), valid_tokens=649_000)
PAIR = STUDY.pairs()[-1]
UPDATES = 50_000
HOURS_OF_1000 = {"sinusoidal_1024": 118.7, "alibi_512": 110.9, "sinusoidal_2048": 135.1, "alibi_1024": 119.5}
"""Spacing of Figure 5's markers; at equal length the methods take equal time (Table 12)."""


def paper_quality(model: ComparedModel) -> Quality:
    """Table 12's row as the last checkpoint, Figure 5's curve, if it has one, before it."""
    row = get_table(12).row(method=model.method, train_length=model.length)
    last = {length: row[str(length)] for length in STUDY.lengths if row[str(length)] is not None}
    perplexities = {UPDATES: last}
    for figure, length in (("5 left", 1024), ("5 right", 2048)):
        for hours, perplexity in get_curves(figure).get(model.name, ()):
            updates = 1000 * round(hours / HOURS_OF_1000[model.name])
            if updates < UPDATES:
                perplexities[updates] = {length: perplexity}
    return Quality(model=model, wall_seconds=3600.0, perplexities=perplexities)


def paper_speed(variant: Variant) -> Speed:
    row = get_table(12).row(method=variant.model.method, train_length=variant.model.length)
    name = {512: "alibi_512", 1024: "alibi_1024", 2048: "sinusoidal_2048"}[variant.model.length]
    seconds = HOURS_OF_1000[name] * 3.6
    zeros = dict.fromkeys(MemoryByKind.__dataclass_fields__, 0)
    memory = MemoryByKind(**{**zeros, "attention_workspace": int(row["memory_gb"] * 1e9)})
    return Speed(
        variant=variant,
        step_seconds=Quartiles(low=seconds, median=seconds, high=seconds),
        turn_medians=dict.fromkeys((1, 2, 3), seconds),
        batch_tokens=1000,
        memory=memory,
        device_bytes=32 * 10**9,
    )


def paper_results() -> Results:
    return Results(
        study=STUDY,
        updates=UPDATES,
        plans={},
        speeds={variant: paper_speed(variant) for variant in variants(STUDY)},
        qualities={model: paper_quality(model) for model in STUDY.models()},
    )


def empty_results() -> Results:
    return Results(study=STUDY, updates=UPDATES, plans={}, speeds={}, qualities={})


def change_quality(results: Results, model: ComparedModel, perplexities: dict[int, dict[int, float]]) -> Results:
    quality = Quality(model=model, wall_seconds=1.0, perplexities=perplexities)
    return dataclasses.replace(results, qualities={**results.qualities, model: quality})


def change_speed(results: Results, model: ComparedModel, attention: str, **changes: Any) -> Results:
    """The results with other fields of one speed."""
    variant = Variant(model=model, attention=attention)
    speed = dataclasses.replace(results.speeds[variant], **changes)
    return dataclasses.replace(results, speeds={**results.speeds, variant: speed})


def change_turns(results: Results, model: ComparedModel, attention: str, *slowness: float) -> Results:
    """The results with other turns of one speed: each is so many times as slow as the median step was."""
    seconds = results.speeds[Variant(model=model, attention=attention)].step_seconds.median
    medians = {n: factor * seconds for n, factor in enumerate(slowness, start=1)}
    return change_speed(results, model, attention, turn_medians=medians)


def slow_alibi_results(slowness: float) -> Results:
    """The paper's numbers, with ALiBi at 1,024 so much slower than sinusoidal positions at 2,048."""
    results = paper_results()
    speeds = dict(results.speeds)
    for attention in ATTENTIONS:
        other = results.speeds[Variant(model=PAIR[1], attention=attention)]
        seconds = slowness * other.step_seconds.median
        variant = Variant(model=PAIR[0], attention=attention)
        speeds[variant] = dataclasses.replace(
            other,
            variant=variant,
            turn_medians=dict.fromkeys((1, 2, 3), seconds),
            step_seconds=Quartiles(low=seconds, median=seconds, high=seconds),
        )
    return dataclasses.replace(results, speeds=speeds)
