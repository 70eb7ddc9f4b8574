"""What a comparison has measured, and what follows from it for the paper's tables and its Figure 5."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalibi.metrics.summary import Quartiles
from megalibi.plan.memory_trace import MemoryByKind
from megalibi.studies.comparison.curves import Level, Point, compare_times, mean_speedup, stand_at
from megalibi.studies.comparison.quality import Quality
from megalibi.studies.comparison.speed import Speed
from megalibi.studies.comparison.study import ALIBI, ATTENTIONS, SINUSOIDAL, ComparedModel, CompareStudy, Variant

Pair = tuple[ComparedModel, ComparedModel]
"""ALiBi at a length, and sinusoidal positions at the next."""


def format_percent(value: float, sign: str = "-") -> str:
    """Return a share as in "8.6%", never "-0.0%"; with the sign "+" as in "+8.6%"."""
    return f"{round(value, 3) + 0.0:{sign}.1%}"


def format_updates(updates: float) -> str:
    """Return updates as in "50,000", and a moment between two updates as in "44,226.2"."""
    return f"{updates:,.1f}".removesuffix(".0")


@dataclass(frozen=True, kw_only=True)
class EqualTime:
    """Where the two models of a pair stand when the first of their trainings is done (Table 11)."""

    hours: float
    """Hours of training until that moment."""
    alibi: Point | None
    """Where the ALiBi model stands then, or None before its first checkpoint."""
    sinusoidal: Point | None
    """Where the sinusoidal model stands then, or None before its first checkpoint."""
    stopped: str | None
    """Position method of the model whose training is not done by then, or None if both end at the same moment."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that is known of a comparison; what is not measured yet is missing."""

    study: CompareStudy
    """The section ``study`` of the file."""
    updates: int
    """The number of updates of every training."""
    plans: Mapping[Variant, MemoryByKind]
    """Computed memory of a rank at the peak of a step."""
    speeds: Mapping[Variant, Speed]
    """What part one has measured."""
    qualities: Mapping[ComparedModel, Quality]
    """What part two has measured."""

    def find_speed(self, model: ComparedModel, attention: str) -> Speed | None:
        """Return the speed of a model with a kind of attention, if it has been measured."""
        return self.speeds.get(Variant(model=model, attention=attention))

    def rate_gain(self, model: ComparedModel, baseline: ComparedModel, attention: str) -> Quartiles | None:
        """Return a model's gain in updates an hour over a baseline as quartiles over the turns; 0.1 is 10% more."""
        speed, other = self.find_speed(model, attention), self.find_speed(baseline, attention)
        has_common = speed and other and speed.turn_medians.keys() & other.turn_medians.keys()
        return speed.rate_gain(other) if speed and other and has_common else None

    def memory_saving(self, model: ComparedModel, baseline: ComparedModel, attention: str) -> float | None:
        """Return by what share a model takes less memory than a baseline at the allocator's peak; 0.1 is 10% less."""
        speed, other = self.find_speed(model, attention), self.find_speed(baseline, attention)
        return 1.0 - speed.memory.total / other.memory.total if speed and other else None

    def planned_saving(self, model: ComparedModel, baseline: ComparedModel, attention: str) -> float | None:
        """Return by what share a model is planned to take less memory than a baseline; 0.1 is 10% less."""
        plan, other = (self.plans.get(Variant(model=which, attention=attention)) for which in (model, baseline))
        return 1.0 - plan.total / other.total if plan and other else None

    def hours(self, model: ComparedModel, attention: str) -> float | None:
        """Return the hours of a whole training at the median time of a step in the turns."""
        speed = self.find_speed(model, attention)
        return None if speed is None else self.updates * speed.step_seconds.median / 3600.0

    def points(self, model: ComparedModel, attention: str, length: int) -> list[Point]:
        """Return a model's checkpoints at one evaluation length by the turns' clock; none if one is missing."""
        speed, quality = self.find_speed(model, attention), self.qualities.get(model)
        return [] if speed is None or quality is None else quality.points(length, speed.step_seconds.median)

    def pair_points(self, pair: Pair, attention: str) -> tuple[list[Point], list[Point]]:
        """Return the curves of a pair at the longer model's length; both are empty if either is missing."""
        alibi, sinusoidal = (self.points(model, attention, pair[1].length) for model in pair)
        return (alibi, sinusoidal) if alibi and sinusoidal else ([], [])

    @property
    def has_curves(self) -> bool:
        """Whether the curves of all pairs are there to be drawn."""
        return all(self.pair_points(pair, kind)[0] for kind in ATTENTIONS for pair in self.study.pairs())

    def levels(self, pair: Pair, attention: str) -> list[Level]:
        """Return when the models of a pair reach five perplexities; none if they have no range in common."""
        alibi, sinusoidal = self.pair_points(pair, attention)
        return compare_times(alibi, sinusoidal) if alibi else []

    def equal_time(self, pair: Pair, attention: str) -> EqualTime | None:
        """Return where a pair stands when the first of its two trainings is done, or None if either is missing."""
        alibi, sinusoidal = self.pair_points(pair, attention)
        if not alibi:
            return None
        ends = {ALIBI: alibi[-1].hours, SINUSOIDAL: sinusoidal[-1].hours}
        hours = min(ends.values())
        return EqualTime(
            hours=hours,
            alibi=stand_at(alibi, hours),
            sinusoidal=stand_at(sinusoidal, hours),
            stopped=next((method for method, end in ends.items() if end > hours), None),
        )

    def at_equal_speed(self, pair: Pair) -> Results:
        """Return the results as if an update of a pair's ALiBi model took as long as one of the sinusoidal model.

        What comes out of them all the same is how well the two learn, and not how fast they run.
        """
        speeds = dict(self.speeds)
        for attention in ATTENTIONS:
            ours, theirs = (self.find_speed(model, attention) for model in pair)
            if ours and theirs:
                speeds[ours.variant] = dataclasses.replace(ours, step_seconds=theirs.step_seconds)
        return dataclasses.replace(self, speeds=speeds)

    def to_json(self) -> dict[str, Any]:
        """Return every number as plain values."""
        return {
            "study": dataclasses.asdict(self.study),
            "updates": self.updates,
            "planned_memory_bytes": {v.name: dataclasses.asdict(memory) for v, memory in self.plans.items()},
            "speed": {variant.name: _speed_to_json(speed) for variant, speed in self.speeds.items()},
            "quality": {model.name: _quality_to_json(quality) for model, quality in self.qualities.items()},
            "pairs": [self._pair_to_json(pair, kind) for kind in ATTENTIONS for pair in self.study.pairs()],
        }

    def _pair_to_json(self, pair: Pair, attention: str) -> dict[str, Any]:
        gain, saving = self.rate_gain(*pair, attention), self.memory_saving(*pair, attention)
        levels, equal_time = self.levels(pair, attention), self.equal_time(pair, attention)
        as_fast = self.at_equal_speed(pair).levels(pair, attention)
        return {
            "alibi": pair[0].name,
            "sinusoidal": pair[1].name,
            "attention": attention,
            "update_rate_gain": None if gain is None else dataclasses.asdict(gain),
            "memory_saving": saving,
            "planned_memory_saving": self.planned_saving(*pair, attention),
            "curves": [[dataclasses.asdict(p) for p in points] for points in self.pair_points(pair, attention)],
            "levels": [{**dataclasses.asdict(level), "speedup": level.speedup} for level in levels],
            "mean_speedup": mean_speedup(levels) if levels else None,
            "mean_speedup_at_equal_speed": mean_speedup(as_fast) if as_fast else None,
            "equal_time": dataclasses.asdict(equal_time) if equal_time else None,
        }


def _speed_to_json(speed: Speed) -> dict[str, Any]:
    return {
        "step_seconds": dataclasses.asdict(speed.step_seconds),
        "turns": list(speed.turn_medians),
        "turn_median_step_seconds": list(speed.turn_medians.values()),
        "turn_spread": speed.turn_spread if len(speed.turn_medians) > 1 else None,
        "disturbance": speed.disturbance,
        "turn_conditions": [dataclasses.asdict(conditions) for conditions in speed.turn_conditions.values()],
        "turns_replaced": speed.turns_replaced,
        "commits": sorted({code.commit for code in speed.codes}),
        "code": next((code.sha256 for code in speed.codes if code.sha256), None),
        "tokens_per_second": speed.tokens_per_second,
        "updates_per_hour": speed.updates_per_hour,
        "allocator_peak_bytes": speed.memory.total,
        "device_peak_bytes": speed.device_bytes,
        "memory_bytes": dataclasses.asdict(speed.memory),
    }


def _quality_to_json(quality: Quality) -> dict[str, Any]:
    return {
        "wall_seconds_of_steps": quality.wall_seconds,
        "perplexity_by_updates_and_length": {updates: dict(by) for updates, by in sorted(quality.perplexities.items())},
    }
