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
        """Return the records that were set aside, because the turn was to be measured again."""
        return sorted(self.folder.glob(f"turn_{self.number}.replaced_*.json"))

    def set_aside(self) -> None:
        """Rename the record, if there is one, so that the turn is measured again."""
        if self.output.is_file():
            rename_synced(self.output, self.folder / f"turn_{self.number}.replaced_{len(self.replaced()) + 1}.json")


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
    same one and a steady drift of the machine meets all alike; and each two rounds begin elsewhere.

    Args:
        turns: From plan_turns.
    """
    models = list(dict.fromkeys(variant.model for variant in turns))
    there = [v for model in models for kind in ATTENTIONS for v in turns if (v.model, v.attention) == (model, kind)]
    rounds = list(zip(*(turns[variant] for variant in there), strict=True))
    ordered: list[Turn] = []
    for number, of_round in enumerate(rounds):
        start = len(there) * (number // 2) // -(-len(rounds) // 2)
        rotated = of_round[start:] + of_round[:start]
        ordered += rotated[:: -1 if number % 2 else 1]
    return ordered


def select_turns(turns: Mapping[Variant, Sequence[Turn]], *, commit: str, again: Collection[int] = ()) -> list[Turn]:
    """Return the turns to measure, in their order: those without a record, and those to measure again.

    Args:
        turns: From plan_turns.
        commit: The commit of megalibi that measures, as commit_of returns it.
        again: Numbers of turns to measure again, with all variants: alone a variant would meet another machine than
            those it is compared with.

    Raises:
        ConfigError: A turn that stays was measured with another configuration or, if any is to be measured, under
            another commit; or there is no turn of a number to measure again.
    """
    ordered = order_turns(turns)
    for number in again:
        if number not in {turn.number for turn in ordered}:
            last = max(turn.number for turn in ordered)
            raise ConfigError(f"--again={number}: must be the number of a turn, from 1 to study.turns={last}")
    found = {turn.output: turn.read() for turn in ordered if turn.number not in again}
    kept = {output: commit_of(record) for output, record in found.items() if record is not None}
    missing = [turn for turn in ordered if turn.output not in kept]
    if missing:
        check_commits(kept, commit)
    return missing


def run_turns(
    turns: Mapping[Variant, Sequence[Turn]], console: Console, *, commit: str, again: Collection[int] = ()
) -> None:
    """Measure what is not measured yet: the first turns of all variants, then the second ones, and so on.

    In this order other work on the machine slows all variants down alike.

    Args:
        turns: From plan_turns.
        console: Where to show progress.
        commit: The commit of megalibi that measures, as commit_of returns it.
        again: Numbers of turns to measure again. The old records stay beside the new ones, and are counted.

    Raises:
        ConfigError: select_turns refuses. Nothing has started, and no record was set aside.
        JobError: A turn failed; the others have ended before.
    """
    missing = select_turns(turns, commit=commit, again=again)
    for turn in {turn.folder: turn for turn in missing}.values():
        check_run(turn.config, turn.machine.ranks)
    total = sum(map(len, turns.values()))
    if len(missing) < total:
        console.print(f"{total - len(missing)} of {total} turns measured already", highlight=False)
    for turn in missing:
        turn.set_aside()
    if missing:
        run_jobs(missing, at_once=1, console=console)


def check_commits(commits: Mapping[Path, str], commit: str | None = None) -> None:
    """Refuse turns of different commits: what changed between them could be taken for a difference of the models.

    Args:
        commits: File of a turn -> the commit that it was measured under.
        commit: The commit of the turns that are to be measured, if there are any.

    Raises:
        ConfigError: There are two commits. Nothing is measured anew by itself, for that would throw work away.
    """
    known = dict.fromkeys(commits.values())
    for output, other in commits.items():
        wanted = next(iter(known)) if commit is None else commit
        if other != wanted:
            there = "other turns" if commit is None else "what is missing would be measured"
            raise ConfigError(
                f"{output} was measured under commit {other}, {there} under {wanted}, and turns of two commits cannot "
                f"be compared: go back to {other}, give another train.output_dir, or delete {output.parent.parent} to "
                "measure all of them anew"
            )


def commit_of(record: Mapping[str, Any]) -> str:
    """Return the commit that a turn was measured under, as if all files had been in it.

    Args:
        record: What a turn wrote, or what describe_origin returns.
    """
    # The results that a study writes may be tracked files themselves, so that its second part finds "-dirty".
    return str(record.get("commit", "unknown")).removesuffix("-dirty")
