"""What part one of the comparison has measured: speed and memory, summed up over the turns of each variant."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megalibi.config import Config
from megalibi.errors import ConfigError
from megalibi.metrics.summary import Quartiles
from megalibi.plan.memory_trace import MemoryByKind
from megalibi.studies.comparison.disturbance import TurnConditions, find_disturbance, mean_difference
from megalibi.studies.comparison.measured_code import Code, check_same_code
from megalibi.studies.comparison.study import CompareStudy, Variant
from megalibi.studies.comparison.turns import Turn


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What the turns of a variant measured."""

    variant: Variant
    """The variant that was measured."""
    step_seconds: Quartiles
    """Quartiles of the seconds of a step, over all counted steps of all turns."""
    turn_medians: Mapping[int, float]
    """Number of a turn -> median seconds of its counted steps."""
    batch_tokens: int
    """The number of tokens of an update."""
    memory: MemoryByKind
    """Bytes of rank 0 at the allocator's peak, of the turn where they were most."""
    device_bytes: int
    """Bytes that the device, or on a CPU the process, held at its peak, libraries included: the most of all turns."""
    turn_conditions: Mapping[int, TurnConditions] = field(default_factory=dict)
    """Number of a turn -> what it was measured beside; results of an earlier form have none."""
    turns_replaced: int = 0
    """How many measured turns were set aside and measured again."""
    on_gpu: bool = False
    """Whether a GPU took the steps, beside whose host's cores other work may go on."""
    codes: tuple[Code, ...] = ()
    """The code that the turns were measured with: the same sources, but maybe of several commits; empty: not known."""

    @property
    def turn_spread(self) -> float:
        """How far two turns lie apart on average: the mean difference of their medians over the median of these."""
        return mean_difference(self.turn_medians)

    @property
    def other_busy_cores(self) -> dict[int, float]:
        """Cores that others kept busy, by turn, where that is known and disturbs: on a CPU, and not beside a GPU."""
        known = {number: turn.other_busy_cores for number, turn in self.turn_conditions.items()}
        return {} if self.on_gpu else {number: cores for number, cores in known.items() if cores is not None}

    @property
    def disturbance(self) -> str:
        """Why nothing can be decided by this speed, in words; empty if it was not disturbed."""
        return find_disturbance(self.turn_medians, self.other_busy_cores)

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second at the median time of a step."""
        return self.batch_tokens / self.step_seconds.median

    @property
    def updates_per_hour(self) -> float:
        """Updates an hour at the median time of a step."""
        return 3600.0 / self.step_seconds.median

    def rate_gain(self, baseline: Speed) -> Quartiles:
        """Return the gain in updates an hour over a baseline as quartiles over the turns; 0.1 is 10% more."""
        common = self.turn_medians.keys() & baseline.turn_medians.keys()
        return Quartiles.of([baseline.turn_medians[n] / self.turn_medians[n] - 1.0 for n in common])


def read_speeds(turns: Mapping[Variant, Sequence[Turn]], study: CompareStudy) -> dict[Variant, Speed]:
    """Return what has been measured so far; variants without a measured turn are left out.

    Args:
        turns: From plan_turns.
        study: The section ``study``, which says how many steps of a turn do not count.

    Raises:
        ConfigError: Turns were measured on different hardware or with different code; such times cannot be
            compared.
    """
    speeds: dict[Variant, Speed] = {}
    hardware: dict[str, Path] = {}
    codes: dict[Path, Code] = {}
    for variant, of_variant in turns.items():
        done = {turn.number: record for turn in of_variant if (record := turn.read()) is not None}
        hardware |= {_hardware_of(record): of_variant[number - 1].output for number, record in done.items()}
        codes |= {of_variant[number - 1].output: Code.of(record) for number, record in done.items()}
        if done:
            speed = summarize_turns(variant, done, study.warm_steps, of_variant[0].config)
            speeds[variant] = dataclasses.replace(
                speed, turns_replaced=sum(len(turn.replaced()) for turn in of_variant)
            )
    check_same_code(codes)
    if len(hardware) > 1:
        one, other = list(hardware.items())[:2]
        raise ConfigError(
            f"{one[1]} and {other[1]} were measured on different hardware ({one[0]}; {other[0]}): delete the turns of "
            "one machine, or give another train.output_dir"
        )
    return speeds


def _hardware_of(record: Mapping[str, Any]) -> str:
    hardware = {name: value for name, value in record["hardware"].items() if name != "memory_bytes"}
    return ", ".join(f"{name} {value}" for name, value in {**hardware, "ranks": record["ranks"]}.items())


def summarize_turns(
    variant: Variant, records: Mapping[int, Mapping[str, Any]], warm_steps: int, config: Config
) -> Speed:
    """Sum up the turns of a variant.

    Args:
        variant: The variant that was measured.
        records: Number of a turn -> what the turn wrote.
        warm_steps: Steps at the beginning of each turn that do not count.
        config: The configuration of the variant.
    """
    counted = {number: record["step_seconds"][warm_steps:] for number, record in records.items()}
    memories = [MemoryByKind(**record["memory"]) for record in records.values()]
    return Speed(
        variant=variant,
        step_seconds=Quartiles.of([seconds for turn in counted.values() for seconds in turn]),
        turn_medians={number: float(np.median(turn)) for number, turn in counted.items()},
        batch_tokens=config.train.global_batch_size * config.data.seq_length,
        memory=max(memories, key=lambda memory: memory.total),
        device_bytes=max(record["device_bytes"] for record in records.values()),
        turn_conditions={number: _conditions_of(record, counted[number]) for number, record in records.items()},
        on_gpu=any("gpu" in record["hardware"] for record in records.values()),
        codes=tuple(dict.fromkeys(map(Code.of, records.values()))),
    )


def _conditions_of(record: Mapping[str, Any], counted_seconds: Sequence[float]) -> TurnConditions:
    seconds = Quartiles.of(counted_seconds)
    known = {name: record.get(name) for name in ("load_before", "load_after", "other_busy_cores")}
    return TurnConditions(step_spread=(seconds.high - seconds.low) / seconds.median, **known)
