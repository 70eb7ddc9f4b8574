"""The turns of part one: what they are, their order, and the processes that measure them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megalibi.config import NO_WEIGHT_DEPENDS_ON, Config, save_config
from megalibi.errors import ConfigError
from megalibi.files import rename_synced
from megalibi.studies.comparison.measured_code import Code, check_same_code
from megalibi.studies.comparison.study import ATTENTIONS, CompareStudy, Variant, variant_config, variants
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

    def replaced(self) -> list[Path]:
        """Return the records that were set aside, because the turn was to be measured again, the first one first."""
        return sorted(self.folder.glob(f"turn_{self.number}.replaced_*.json"), key=_replacement_of)

    def set_aside(self) -> None:
        """Rename the record, if there is one, so that the turn is measured again."""
        if self.output.is_file():
            last = max(map(_replacement_of, self.replaced()), default=0)
            rename_synced(self.output, self.folder / f"turn_{self.number}.replaced_{last + 1}.json")


def _replacement_of(path: Path) -> int:
    """Return the K of turn_N.replaced_K.json, and 0 where that is no number."""
    count = path.stem.rpartition("_")[2]
    return int(count) if count.isdecimal() else 0


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
    """Return the turns round by round: in each round every model with every kind of attention once.

    What is compared stands close together. Every second round goes backwards, so that no variant always follows the
    same one, and a steady drift of the machine meets all alike over an even number of turns.

    Args:
        turns: From plan_turns.
    """
    models = list(dict.fromkeys(variant.model for variant in turns))
    there = [v for model in models for kind in ATTENTIONS for v in turns if (v.model, v.attention) == (model, kind)]
    rounds = list(zip(*(turns[variant] for variant in there), strict=True))
    ordered: list[Turn] = []
    for number, of_round in enumerate(rounds):
        ordered += of_round[:: -1 if number % 2 else 1]
    return ordered


def select_turns(turns: Mapping[Variant, Sequence[Turn]], *, code: Code, again: Collection[int] = ()) -> list[Turn]:
    """Return the turns to measure, in their order: those without a record, and those to measure again.

    Args:
        turns: From plan_turns.
        code: The code of megalibi that measures.
        again: Numbers of turns to measure again, with all variants: alone a variant would meet another machine than
            those it is compared with.

    Raises:
        ConfigError: A turn that stays was measured with another configuration or, if any is to be measured, with
            other code; or there is no turn of a number to measure again.
    """
    ordered = order_turns(turns)
    for number in again:
        if number not in {turn.number for turn in ordered}:
            last = max(turn.number for turn in ordered)
            raise ConfigError(f"--again={number}: must be the number of a turn, from 1 to study.turns={last}")
    found = {turn.output: turn.read() for turn in ordered if turn.number not in again}
    kept = {output: Code.of(record) for output, record in found.items() if record is not None}
    missing = [turn for turn in ordered if turn.output not in kept]
    if missing:
        check_same_code(kept, code)
    return missing


def run_turns(
    turns: Mapping[Variant, Sequence[Turn]],
    console: Console,
    *,
    code: Code,
    again: Collection[int] = (),
    resume: str = "the same command goes on",
) -> None:
    """Measure what is not measured yet: the first turns of all variants, then the second ones, and so on.

    In this order other work on the machine slows all variants down alike.

    Args:
        turns: From plan_turns.
        console: Where to show progress.
        code: The code of megalibi that measures.
        again: Numbers of turns to measure again. The old records stay beside the new ones, and are counted.
        resume: How to go on after an interruption, in words: with ``again`` not by the same command.

    Raises:
        ConfigError: select_turns refuses. Nothing has started, and no record was set aside.
        JobError: A turn failed; the others have ended before.
    """
    missing = select_turns(turns, code=code, again=again)
    for turn in {turn.folder: turn for turn in missing}.values():
        check_run(turn.config, turn.machine.ranks)
    total = sum(map(len, turns.values()))
    if len(missing) < total:
        console.print(f"{total - len(missing)} of {total} turns measured already", highlight=False)
    for turn in missing:
        turn.set_aside()
    if missing:
        run_jobs(missing, at_once=1, console=console, resume=resume)
