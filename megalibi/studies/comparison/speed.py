"""Part one of the comparison: speed and memory, in turns of fresh processes; the result of each turn is kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megalibi.config import NO_WEIGHT_DEPENDS_ON, Config, save_config
from megalibi.errors import ConfigError
from megalibi.metrics.summary import Quartiles
from megalibi.plan.memory_trace import MemoryByKind
from megalibi.studies.comparison.study import CompareStudy, Variant, variant_config, variants
from megalibi.studies.machinery.jobs import run_jobs
from megalibi.studies.machinery.machine import Machine
from megalibi.studies.machinery.trainings import check_unchanged
from megalibi.train.check import check_run

# Recomputation changes no weight, but it costs time and saves memory.
_NO_TURN_DEPENDS_ON = NO_WEIGHT_DEPENDS_ON - {"model.recompute"}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a variant; ``train.output_dir`` of its configuration is the variant's folder."""

    config: Config
    """The configuration of the steps that are measured."""
    number: int
    """The number of the turn, from 1 on."""
    machine: Machine
    """The machine to measure on."""

    @property
    def folder(self) -> Path:
        """The folder of the variant."""
        return Path(self.config.train.output_dir)

    @property
    def name(self) -> str:
        """The name of the turn on the console."""
        return f"{self.folder.name} turn {self.number}"

    @property
    def output(self) -> Path:
        """The JSON file with what was measured."""
        return self.folder / f"turn_{self.number}.json"

    @property
    def log(self) -> Path:
        """The file that gets the output of the process."""
        return self.folder / f"turn_{self.number}.log"

    def prepare(self) -> None:
        """Write the YAML file."""
        save_config(self.config, self.folder / "turn.yaml")

    def command(self, slot: int) -> list[str]:
        """Return the command that measures."""
        measure = self.machine.launch(slot, "study", "measure-turn")
        return [*measure, "--config", str(self.folder / "turn.yaml"), "--output", str(self.output)]

    def environment(self, slot: int) -> dict[str, str]:
        """Return the environment to measure in."""
        return self.machine.environment_of(slot, self.machine.ranks)

    def progress(self) -> None:
        """Return None: a turn is too short to say how far it is."""

    def finish(self, exit_code: int) -> str | None:
        """Return what went wrong. The output file decides: launchers have exit codes of their own."""
        return None if self.output.is_file() else f"failed with exit code {exit_code}"

    def read(self) -> dict[str, Any] | None:
        """Return what was measured, or None before that.

        Raises:
            ConfigError: It was measured with another configuration.
        """
        if not self.output.is_file():
            return None
        turn = json.loads(self.output.read_text(encoding="utf-8"))
        check_unchanged(self.config, turn["config"], free=_NO_TURN_DEPENDS_ON, what=f"{self.output} was measured")
        return dict(turn)


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


def plan_turns(base: Config, study: CompareStudy, machine: Machine) -> dict[Variant, list[Turn]]:
    """Return the turns of every variant.

    Args:
        base: The study's configuration.
        study: Its section ``study``.
        machine: Where they run.
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
    """Return the turns round by round, every second round backwards, so that no variant always follows the same one.

    Args:
        turns: From plan_turns.
    """
    rounds = zip(*turns.values(), strict=True)
    return [turn for number, of_round in enumerate(rounds) for turn in of_round[:: -1 if number % 2 else 1]]


def run_turns(turns: Mapping[Variant, Sequence[Turn]], console: Console) -> None:
    """Measure what is not measured yet: the first turns of all variants, then the second ones, and so on.

    In this order other work on the machine slows all variants down alike.

    Args:
        turns: From plan_turns.
        console: Where to show progress.

    Raises:
        ConfigError: A turn was measured with another configuration. Nothing has started.
        JobError: A turn failed; the others have ended before.
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
    """Return what has been measured so far; variants without a measured turn are left out.

    Args:
        turns: From plan_turns.
        study: The section ``study``, which says how many steps of a turn do not count.

    Raises:
        ConfigError: Turns were measured on different hardware; such times cannot be compared.
    """
    speeds: dict[Variant, Speed] = {}
    hardware: dict[str, Path] = {}
    for variant, of_variant in turns.items():
        done = {turn.number: record for turn in of_variant if (record := turn.read()) is not None}
        hardware |= {_hardware_of(record): of_variant[number - 1].output for number, record in done.items()}
        if done:
            speeds[variant] = summarize_turns(variant, done, study.warm_steps, of_variant[0].config)
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
    )
