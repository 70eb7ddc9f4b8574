"""What a comparison has measured, and what the paper's tables and its Figure 5 are made of."""

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
from megalibi.studies.comparison.study import ALIBI, ATTENTIONS, SINUSOIDAL, CompareStudy, Model, Variant

Pair = tuple[Model, Model]
"""ALiBi, and sinusoidal positions at the next length."""


def format_percent(value: float, sign: str = "-") -> str:
    """Write a share as 8.6%, and never as -0.0%; with the sign "+", as +8.6%."""
    return f"{round(value, 3) + 0.0:{sign}.1%}"


def format_updates(updates: float) -> str:
    """Write updates as 50,000, and a moment between two as 44,226.2."""
    return f"{updates:,.1f}".removesuffix(".0")


@dataclass(frozen=True, kw_only=True)
class EqualTime:
    """A pair when the first of its two trainings is done, on one kind of attention (Table 11)."""

    hours: float
    """When that is."""
    alibi: Point | None
    """Where it stands then; None: it has no checkpoint yet."""
    sinusoidal: Point | None
    """The same."""
    stopped: str | None
    """Method of the model whose training is not done by then; None: both end at once."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that is known; parts that are not measured yet are missing."""

    study: CompareStudy
    updates: int
    """Of every training."""
    plans: Mapping[Variant, MemoryByKind]
    """Computed memory of a rank."""
    speeds: Mapping[Variant, Speed]
    qualities: Mapping[Model, Quality]

    def find_speed(self, model: Model, attention: str) -> Speed | None:
        """Return what was measured of a model with a kind of attention, if it was."""
        return self.speeds.get(Variant(model=model, attention=attention))

    def rate_gain(self, model: Model, baseline: Model, attention: str) -> Quartiles | None:
        """Return how many more updates an hour a model makes than a baseline, 0.1 for 10%, turn by turn."""
        speed, other = self.find_speed(model, attention), self.find_speed(baseline, attention)
        return speed.rate_gain(other) if speed and other else None

    def memory_saving(self, model: Model, baseline: Model, attention: str) -> float | None:
        """Return how much less memory a model takes than a baseline, 0.1 for 10%, at the allocator's peak."""
        speed, other = self.find_speed(model, attention), self.find_speed(baseline, attention)
        return 1.0 - speed.memory.total / other.memory.total if speed and other else None

    def planned_saving(self, model: Model, baseline: Model, attention: str) -> float | None:
        """Return the same, as computed."""
        plan, other = (self.plans.get(Variant(model=which, attention=attention)) for which in (model, baseline))
        return 1.0 - plan.total / other.total if plan and other else None

    def hours(self, model: Model, attention: str) -> float | None:
        """Return what a whole training takes by the turns' clock."""
        speed = self.find_speed(model, attention)
        return None if speed is None else self.updates * speed.step_seconds.median / 3600.0

    def points(self, model: Model, attention: str, length: int) -> list[Point]:
        """Return a model's checkpoints at one evaluation length against the turns' clock; none if either is missing."""
        speed, quality = self.find_speed(model, attention), self.qualities.get(model)
        return [] if speed is None or quality is None else quality.points(length, speed.step_seconds.median)

    def pair_points(self, pair: Pair, attention: str) -> tuple[list[Point], list[Point]]:
        """Return the curves of a pair, at the longer model's length; two empty ones if either is missing."""
        alibi, sinusoidal = (self.points(model, attention, pair[1].length) for model in pair)
        return (alibi, sinusoidal) if alibi and sinusoidal else ([], [])

    @property
    def has_curves(self) -> bool:
        """Whether there is anything to draw."""
        return all(self.pair_points(pair, kind)[0] for kind in ATTENTIONS for pair in self.study.pairs())

    def levels(self, pair: Pair, attention: str) -> list[Level]:
        """Return when the two of a pair reach five perplexities; none if they have no range in common."""
        alibi, sinusoidal = self.pair_points(pair, attention)
        return compare_times(alibi, sinusoidal) if alibi else []

    def equal_time(self, pair: Pair, attention: str) -> EqualTime | None:
        """Return where a pair stands when the first of its two trainings is done; None if either is missing."""
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
            "equal_time": dataclasses.asdict(equal_time) if equal_time else None,
        }


def _speed_to_json(speed: Speed) -> dict[str, Any]:
    return {
        "step_seconds": dataclasses.asdict(speed.step_seconds),
        "turn_median_step_seconds": list(speed.turn_medians.values()),
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
