"""The evaluations of a study: each is a process of ``megalibi evaluate``, and none is done twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megalibi.checkpoint.manifest import MANIFEST_CHECKSUM
from megalibi.errors import UserError
from megalibi.evaluate.result import EvaluationResult, read_evaluation, write_evaluation
from megalibi.studies.machinery.jobs import JobProgress, run_jobs
from megalibi.studies.machinery.machine import Machine


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """One call of ``megalibi evaluate``. Calls that share an output collect their lengths in it."""

    label: str
    """The name of the model on the console."""
    checkpoint: Path
    """The folder of the checkpoint to evaluate."""
    data: str
    """Prefix of the token file with the text."""
    protocol: str
    """The protocol: nonoverlapping or sliding."""
    stride: int | None = None
    """Tokens between the starts of two windows of sliding evaluation."""
    tokens: int
    """How many tokens of the text are scored, from the first on."""
    lengths: tuple[int, ...]
    """The evaluation lengths of this call."""
    slope_scale: str | None = None
    """What the slopes of ALiBi are multiplied by, as --slope-scale takes it; None: by nothing."""
    by_position: bool = False
    """Whether the results must have the losses by position, too; known results without them do not count then."""
    output: Path
    """The JSON file to write, or to add results to."""
    machine: Machine
    """The machine to evaluate on."""

    @property
    def name(self) -> str:
        """The name of the evaluation on the console."""
        return f"{self.label} {self.protocol} {self._lengths}"

    @property
    def log(self) -> Path:
        """The file that gets the output of the process."""
        return self.output.with_name(f"{self.output.stem}_{self._lengths}.log")

    def prepare(self) -> None:
        """Do nothing: the command says everything."""

    def command(self, slot: int) -> list[str]:
        """Return the command that evaluates."""
        options = {**self._question(), "checkpoint": self.checkpoint, "lengths": self._lengths, "output": self._part}
        given = {name.replace("_", "-"): str(value) for name, value in options.items() if value is not None}
        arguments = [text for name, value in given.items() for text in (f"--{name}", value)]
        return [*self.machine.start("evaluate"), *arguments, *["--by-position"] * self.by_position]

    def environment(self, slot: int) -> dict[str, str]:
        """Return the environment to evaluate in."""
        return self.machine.environment_of(slot, 1)

    def progress(self) -> JobProgress | None:
        """Return how far it is, from the last line that the process has printed."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:] if self.log.exists() else []
        percent = [word for word in lines[0].split() if word.endswith("%,")] if lines else []
        done = float(percent[0].removesuffix("%,")) if percent else 0.0
        return JobProgress(done=done, total=100.0, words=lines[0]) if percent else None

    def finish(self, exit_code: int) -> str | None:
        """Add the results of this call to the output; return what went wrong, if anything."""
        if exit_code or not self._part.is_file():
            return f"failed with exit code {exit_code}"
        evaluation = read_evaluation(self._part)
        known = {result.length: result for result in (*self._known_results(), *evaluation.results)}
        results = tuple(known[length] for length in sorted(known))
        question, model = self._question(), self._model()
        write_evaluation(dataclasses.replace(evaluation, results=results, question=question, model=model), self.output)
        self._part.unlink()
        self.log.unlink()  # after a good end it has nothing that the output does not have
        return None

    def is_finished(self) -> bool:
        """Return whether the output has all that this call asks for, of the same checkpoint, text and protocol."""
        known = (row for row in self._known_results() if row.by_position is not None or not self.by_position)
        return set(self.lengths) <= {row.length for row in known}

    @property
    def _lengths(self) -> str:
        return ",".join(map(str, self.lengths))

    @property
    def _part(self) -> Path:
        return self.output.with_name(f"{self.output.stem}_{self._lengths}.part")

    def _question(self) -> dict[str, Any]:
        """Return what the results depend on beside the model and the length."""
        question = {"data": self.data, "protocol": self.protocol, "stride": self.stride, "tokens": self.tokens}
        # Only where there is one: files from before there was an option for it answer the question without it.
        return question if self.slope_scale is None else {**question, "slope_scale": self.slope_scale}

    def _model(self) -> str:
        """Return what identifies the checkpoint: the checksum of the checksums of its files."""
        return (self.checkpoint / MANIFEST_CHECKSUM).read_text(encoding="utf-8")

    def _known_results(self) -> tuple[EvaluationResult, ...]:
        try:
            old = read_evaluation(self.output)
            same = old.question == self._question() and old.model == self._model()
            return old.results if same else ()
        except (OSError, UserError):
            return ()


def run_scorings(scorings: Sequence[Scoring], console: Console) -> None:
    """Evaluate everything that is not evaluated yet.

    Args:
        scorings: The evaluations, all on the same machine.
        console: Where to show progress.

    Raises:
        JobError: An evaluation failed; the others have ended before.
    """
    missing = [scoring for scoring in scorings if not scoring.is_finished()]
    known = len(scorings) - len(missing)
    if known:
        console.print(f"{known} of {len(scorings)} evaluations known already", highlight=False, soft_wrap=True)
    if missing:
        run_jobs(missing, at_once=missing[0].machine.jobs, console=console)
