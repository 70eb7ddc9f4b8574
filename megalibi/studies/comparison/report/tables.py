"""The tables of a comparison in Markdown, with the paper's numbers beside ours; a dash is what was not measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megalibi.plan.memory_trace import MemoryByKind
from megalibi.report.markdown import format_table
from megalibi.studies.comparison.curves import Level, Point, compare_times, mean_speedup
from megalibi.studies.comparison.results import Pair, Results, format_percent, format_updates
from megalibi.studies.comparison.speed import Speed
from megalibi.studies.comparison.study import ATTENTIONS, ComparedModel, Variant
from megalibi.studies.paper import get_curves, get_table
from megalibi.units import format_count

PAPER_LENGTHS = (512, 1024, 2048)
_FIGURE_5 = {1024: "5 left", 2048: "5 right"}  # by the length of the sinusoidal model
_NONE = "-"
_TURN_HEADS = ["turns", "between turns", "in a turn", "load", "other cores"]
_KINDS = [field.name for field in dataclasses.fields(MemoryByKind)]
_KIND_NAMES = [kind.replace("_", " ") for kind in _KINDS]


def speed_table(results: Results, attention: str) -> Iterator[str]:
    """Yield the table of speed and memory of every model with one kind of attention."""
    heads = ["model", "tokens/s", "updates/hour", "seconds of an update", *_TURN_HEADS]
    heads += ["device, GB", "allocator, GB", *_KIND_NAMES]
    return format_table(
        heads, (_speed_row(results, Variant(model=model, attention=attention)) for model in results.study.models())
    )


def _speed_row(results: Results, variant: Variant) -> list[str]:
    speed = results.speeds.get(variant)
    if speed is None:
        return [str(variant.model), *[_NONE] * (5 + len(_TURN_HEADS) + len(_KINDS))]
    seconds = speed.step_seconds
    return [
        str(variant.model),
        format_count(speed.tokens_per_second),
        f"{speed.updates_per_hour:,.0f}",
        f"{seconds.median:.3g} [{seconds.low:.3g}, {seconds.high:.3g}]",
        *_turn_cells(speed),
        _gigabytes(speed.device_bytes),
        *_kind_cells(speed.memory),
    ]


def _turn_cells(speed: Speed) -> list[str]:
    turns = f"{len(speed.turn_medians)}{f' ({speed.turns_replaced})' if speed.turns_replaced else ''}"
    between = f"{speed.turn_spread:.1%}" if len(speed.turn_medians) > 1 else _NONE
    conditions = list(speed.turn_conditions.values())
    loads = [load for turn in conditions for load in (turn.load_before, turn.load_after) if load is not None]
    others = [turn.other_busy_cores for turn in conditions if turn.other_busy_cores is not None]
    return [
        turns,
        between,
        f"{max(turn.step_spread for turn in conditions):.1%}" if conditions else _NONE,
        f"{min(loads):.2f} to {max(loads):.2f}" if loads else _NONE,
        f"{max(others):.2f}" if others else _NONE,
    ]


def _kind_cells(memory: MemoryByKind) -> list[str]:
    return [_gigabytes(memory.total), *(_gigabytes(getattr(memory, kind)) for kind in _KINDS)]


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g}" if num_bytes else "0"


def plan_table(results: Results) -> Iterator[str]:
    """Yield the table of the memory that is computed for every variant."""
    rows = ([str(variant.model), variant.attention, *_kind_cells(plan)] for variant, plan in results.plans.items())
    return format_table(["model", "attention", "in all, GB", *_KIND_NAMES], rows, left=2)


def gain_table(results: Results) -> Iterator[str]:
    """Yield the table of what ALiBi gains in each pair, in updates an hour and in memory."""
    heads = ["", *(f"more updates an hour, {attention}" for attention in ATTENTIONS), "*paper*"]
    heads += [*(f"less memory, {attention} (planned)" for attention in ATTENTIONS), "*paper*"]
    return format_table(heads, (_gain_row(results, pair) for pair in results.study.pairs()))


def _gain_row(results: Results, pair: Pair) -> list[str]:
    gains = [results.rate_gain(*pair, attention) for attention in ATTENTIONS]
    savings = [results.memory_saving(*pair, attention) for attention in ATTENTIONS]
    plans = [results.planned_saving(*pair, attention) for attention in ATTENTIONS]
    ours, theirs = (find_paper_row(results, 11, model) for model in pair)
    return [
        f"{pair[0]} against {pair[1]}",
        *(_NONE if g is None else f"{g.median:+.1%} [{g.low:+.1%}, {g.high:+.1%}]" for g in gains),
        f"*{ours['updates_thousands'] / theirs['updates_thousands'] - 1.0:+.1%}*" if ours and theirs else _NONE,
        *(f"{_percent(saving)} ({_percent(plan)})" for saving, plan in zip(savings, plans, strict=True)),
        f"*{1.0 - ours['memory_gb'] / theirs['memory_gb']:.1%}*" if ours and theirs else _NONE,
    ]


def _percent(value: float | None) -> str:
    return _NONE if value is None else format_percent(value)


def find_paper_row(results: Results, table: int, model: ComparedModel) -> Mapping[str, Any] | None:
    """Return the paper's row of a model, or None if this comparison has other lengths than the paper's."""
    if results.study.lengths != PAPER_LENGTHS:
        return None
    return get_table(table).row(method=model.method, train_length=model.length)


def paper_levels(pair: Pair) -> list[Level]:
    """Return what our computation gives for the digitised points of the paper's Figure 5."""
    curves = get_curves(_FIGURE_5[pair[1].length])
    ours, theirs = (
        [Point(updates=0, hours=hours, perplexity=perplexity) for hours, perplexity in curves[model.name]]
        for model in pair
    )
    return compare_times(ours, theirs)


def level_table(results: Results) -> Iterator[str]:
    """Yield the table of how much earlier ALiBi reaches five perplexities, for each pair and kind of attention."""
    rows = []
    for pair in results.study.pairs():
        for attention in ATTENTIONS:
            rows.append([f"{pair[0]} against {pair[1]}", attention, *_level_cells(results.levels(pair, attention))])
        if results.study.lengths == PAPER_LENGTHS:
            cells = [f"*{cell}*" for cell in _level_cells(paper_levels(pair))]
            rows.append([f"{pair[0]} against {pair[1]}", "*paper*", *cells])
    return format_table(["", "attention", "mean", "first", "second", "third", "fourth", "fifth"], rows, left=2)


def _level_cells(levels: Sequence[Level]) -> list[str]:
    if not levels:
        return [_NONE] * 6
    return [f"{mean_speedup(levels):+.1%}", *(f"{level.speedup:+.1%} at {level.perplexity:.4g}" for level in levels)]


def equal_time_table(results: Results) -> Iterator[str]:
    """Yield the analogue of Table 11: each pair at the moment when the first of its trainings is done."""
    heads = ["model", "attention", "allocator, GB", "updates", "hours", "evaluated at", "perplexity"]
    heads += ["*GB*", "*updates*", "*GPU hours*", "*perplexity*"]
    rows = []
    for pair in results.study.pairs():
        for attention in ATTENTIONS:
            equal = results.equal_time(pair, attention)
            points = dict(zip(pair, (equal.alibi, equal.sinusoidal), strict=True)) if equal else {}
            for model in reversed(pair):
                cells = [_memory_cell(results, model, attention), *_point_cells(points.get(model))]
                cells[3:3] = [f"{pair[1].length:,}"]
                rows.append([str(model), attention, *cells, *_paper_cells_11(results, model, pair[1].length)])
    return format_table(heads, rows, left=2)


def _point_cells(point: Point | None) -> list[str]:
    if point is None:
        return [_NONE] * 3
    return [format_updates(point.updates), f"{point.hours:.3g}", f"{point.perplexity:,.2f}"]


def _memory_cell(results: Results, model: ComparedModel, attention: str) -> str:
    speed = results.find_speed(model, attention)
    return _NONE if speed is None else _gigabytes(speed.memory.total)


def _paper_cells_11(results: Results, model: ComparedModel, length: int) -> list[str]:
    row = find_paper_row(results, 11, model)
    if row is None:
        return [_NONE] * 4
    hours = f"{row['gpu_hours_thousands']}k"
    return [f"*{c}*" for c in (row["memory_gb"], f"{row['updates_thousands']}k", hours, row[str(length)])]


def equal_updates_table(results: Results) -> Iterator[str]:
    """Yield the analogue of Table 12: every model after all updates, ALiBi also far beyond its training length."""
    beyond = [2 * results.study.lengths[-1], results.study.longest_evaluation]
    heads = ["model", *(f"GB, {attention}" for attention in ATTENTIONS), *(f"hours, {a}" for a in ATTENTIONS)]
    heads += ["hours of steps as run", *(f"at {length:,}" for length in (*results.study.lengths, *beyond))]
    heads += ["*GB*", "*GPU hours*", *(f"*at {length:,}*" for length in PAPER_LENGTHS)]
    return format_table(heads, (_row_12(results, model, beyond) for model in results.study.models()))


def _row_12(results: Results, model: ComparedModel, beyond: Sequence[int]) -> list[str]:
    quality, paper = results.qualities.get(model), find_paper_row(results, 12, model)
    hours = [results.hours(model, attention) for attention in ATTENTIONS]
    finals = [quality.final(length) if quality else None for length in (*results.study.lengths, *beyond)]
    theirs = [_NONE] * 5
    if paper is not None:
        cells = [paper["memory_gb"], f"{paper['gpu_hours_thousands']}k", *(paper[str(n)] for n in PAPER_LENGTHS)]
        theirs = [_NONE if cell is None else f"*{cell}*" for cell in cells]
    return [
        str(model),
        *(_memory_cell(results, model, attention) for attention in ATTENTIONS),
        *(_NONE if value is None else f"{value:.3g}" for value in hours),
        f"{quality.wall_seconds / 3600.0:.3g}" if quality else _NONE,
        *(_NONE if value is None else f"{value:,.2f}" for value in finals),
        *theirs,
    ]
