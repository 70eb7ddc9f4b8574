"""Part one of the comparison: speed and memory, in turns of fresh processes, each of which is kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megalibi.config import NO_WEIGHT_DEPENDS_ON, Config, config_to_dict, save_config
from megalibi.errors import ConfigError
from megalibi.metrics.summary import Quartiles
from megalibi.plan.memory_trace import MemoryByKind
from megalibi.studies.comparison.study import CompareStudy, Variant, variant_config, variants
from megalibi.studies.machinery.jobs import run_jobs
from megalibi.studies.machinery.machine import Machine
from megalibi.train.check import check_run

# Recomputation leaves the weights as they are, and takes time and spares memory.
_WITHOUT_EFFECT = NO_WEIGHT_DEPENDS_ON - {"model.recompute"}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a variant; ``train.output_dir`` of its configuration is the variant's folder."""

    config: Config
    number: int
    """From 1 on."""
    machine: Machine
    """Its pretrain is launch/measure_turn.py."""

    @property
    def folder(self) -> Path:
        """The variant's."""
        return Path(self.config.train.output_dir)

    @property
    def name(self) -> str:
        """As the console calls it."""
        return f"{self.folder.name} turn {self.number}"

    @property
    def output(self) -> Path:
        """What was measured."""
        return self.folder / f"turn_{self.number}.json"

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.folder / f"turn_{self.number}.log"

    def prepare(self) -> None:
        """Write the YAML."""
        save_config(self.config, self.folder / "turn.yaml")

    def command(self, slot: int) -> list[str]:
        """Return what measures."""
        return [
            *self.machine.launch(slot), "--config", str(self.folder / "turn.yaml"), "--output", str(self.output)
        ]  # fmt: skip

    def environment(self, slot: int) -> dict[str, str]:
        """Return the environment to measure in."""
        return self.machine.environment_of(slot, self.machine.ranks)

    def progress(self) -> None:
        """A turn is too short to say how far it is."""

    def finish(self, exit_code: int) -> str | None:
        """Return what is wrong, judged by the file: launchers have exit codes of their own."""
        return None if self.output.is_file() else f"failed with exit code {exit_code}"

    def read(self) -> dict[str, Any] | None:
        """Return what was measured; None: not yet.

        Raises:
            ConfigError: It was measured with another configuration.
        """
        if not self.output.is_file():
            return None
        turn = json.loads(self.output.read_text(encoding="utf-8"))
        ours = json.loads(json.dumps(config_to_dict(self.config)))
        changed = [
            f"{section}.{name}={value}, not {turn['config'].get(section, {}).get(name)}"
            for section, fields in ours.items()
            for name, value in fields.items()
            if f"{section}.{name}" not in _WITHOUT_EFFECT and turn["config"].get(section, {}).get(name) != value
        ]
        if changed:
            raise ConfigError(
                f"{self.output} was measured with another configuration than this study's: {'; '.join(changed)}; give "
                "the values it was measured with, or another train.output_dir"
            )
        return dict(turn)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What the turns of a variant measured."""

    variant: Variant
    step_seconds: Quartiles
    """Over all counted steps of all turns."""
    turn_medians: Mapping[int, float]
    """Median seconds of a step by the turn's number."""
    batch_tokens: int
    """Of an update."""
    memory: MemoryByKind
    """Bytes of rank 0 at the allocator's peak, the highest of all turns."""
    device_bytes: int
    """What the device, or on a CPU the process, held at its peak, libraries included: the highest of all turns."""

    @property
    def tokens_per_second(self) -> float:
        """Of the median step."""
        return self.batch_tokens / self.step_seconds.median

    @property
    def updates_per_hour(self) -> float:
        """Of the median step."""
        return 3600.0 / self.step_seconds.median

    def rate_gain(self, baseline: Speed) -> Quartiles:
        """Return how many more updates an hour than a baseline's it makes, 0.1 for 10%, turn by turn."""
        common = self.turn_medians.keys() & baseline.turn_medians.keys()
        return Quartiles.of([baseline.turn_medians[n] / self.turn_medians[n] - 1.0 for n in common])


def plan_turns(base: Config, study: CompareStudy, machine: Machine) -> dict[Variant, list[Turn]]:
    """Return the turns of every variant.

    Args:
        base: The study's configuration.
        study: Its section.
        machine: Where they run; its pretrain is launch/measure_turn.py.
    """
    alone = dataclasses.replace(machine, jobs=1)  # nothing runs beside what is timed
    return {
        variant: [
            Turn(config=variant_config(base, study, variant), number=number, machine=alone)
            for number in range(1, study.turns + 1)
        ]
        for variant in variants(study)
    }


def order_turns(turns: Mapping[Variant, Sequence[Turn]]) -> list[Turn]:
    """Return the turns round by round, every other round backwards: none always follows the same neighbour.

    Args:
        turns: From plan_turns.
    """
    rounds = zip(*turns.values(), strict=True)
    return [turn for number, of_round in enumerate(rounds) for turn in of_round[:: -1 if number % 2 else 1]]


def run_turns(turns: Mapping[Variant, Sequence[Turn]], console: Console) -> None:
    """Measure what is not measured yet: the first turns of all variants, then the second ones.

    So the machine's other work hits the variants alike.

    Args:
        turns: From plan_turns.
        console: Where to show progress.

    Raises:
        ConfigError: A turn failed, after the others; or was measured with another configuration.
    """
    ordered = order_turns(turns)
    missing = [turn for turn in ordered if turn.read() is None]
    for turn in {turn.folder: turn for turn in missing}.values():
        check_run(turn.config, turn.machine.ranks)
    if len(missing) < len(ordered):
        console.print(f"{len(ordered) - len(missing)} of {len(ordered)} turns measured already", highlight=False)
    if missing:
        run_jobs(missing, at_once=1, console=console)


def read_speeds(turns: Mapping[Variant, Sequence[Turn]], study: CompareStudy) -> dict[Variant, Speed]:
    """Return what has been measured so far; variants without a turn are not among it.

    Args:
        turns: From plan_turns.
        study: Says which steps count.

    Raises:
        ConfigError: Turns were measured on different hardware: times of different machines are not comparable.
    """
    speeds: dict[Variant, Speed] = {}
    hardware: dict[str, Path] = {}
    for variant, of_variant in turns.items():
        done = {turn.number: record for turn in of_variant if (record := turn.read()) is not None}
        hardware |= {_hardware_of(record): of_variant[number - 1].output for number, record in done.items()}
        if done:
            speeds[variant] = summarize(variant, done, study.warm_steps, of_variant[0].config)
    if len(hardware) > 1:
        one, other = list(hardware.items())[:2]
        raise ConfigError(
            f"{one[1]} and {other[1]} were measured on different hardware ({one[0]}; {other[0]}): delete those of one "
            "of them, or give another train.output_dir"
        )
    return speeds


def _hardware_of(record: Mapping[str, Any]) -> str:
    hardware = {name: value for name, value in record["hardware"].items() if name != "memory_bytes"}
    return ", ".join(f"{name} {value}" for name, value in {**hardware, "ranks": record["ranks"]}.items())


def summarize(variant: Variant, records: Mapping[int, Mapping[str, Any]], warm_steps: int, config: Config) -> Speed:
    """Sum the turns of a variant up.

    Args:
        variant: What was measured.
        records: What each turn wrote, by its number.
        warm_steps: Of each turn, from its beginning on, that do not count.
        config: Of the variant.
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
    )
