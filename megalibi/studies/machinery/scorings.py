"""The evaluations of a study: tools/evaluate.py as processes, none of them done twice."""

from __future__ import annotations

import dataclasses
import sys
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
    """One call of tools/evaluate.py; several calls may share an output, which then has the lengths of them all."""

    label: str
    """What the console calls the model."""
    checkpoint: Path
    """A step's folder."""
    data: str
    """Prefix of the text."""
    protocol: str
    """nonoverlapping or sliding."""
    stride: int | None = None
    """Tokens between sliding windows."""
    tokens: int
    """Of the text, from the first on."""
    lengths: tuple[int, ...]
    """Scored by this call."""
    output: Path
    """The .json to write, or to add to."""
    machine: Machine

    @property
    def name(self) -> str:
        """As the console calls it."""
        return f"{self.label} {self.protocol} {self._lengths}"

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.output.with_name(f"{self.output.stem}_{self._lengths}.log")

    def prepare(self) -> None:
        """Do nothing: all is in the command."""

    def command(self, slot: int) -> list[str]:
        """Return what evaluates."""
        options = {**self._question(), "checkpoint": self.checkpoint, "lengths": self._lengths, "output": self._part}
        arguments = [text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))]
        return [sys.executable, str(self.machine.evaluate), *arguments]

    def environment(self, slot: int) -> dict[str, str]:
        """Return the environment to evaluate in."""
        return self.machine.environment_of(slot, 1)

    def progress(self) -> JobProgress | None:
        """Return how far it is: what evaluate.py said last."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:] if self.log.exists() else []
        percent = [word for word in lines[0].split() if word.endswith("%,")] if lines else []
        done = float(percent[0].removesuffix("%,")) if percent else 0.0
        return JobProgress(done=done, total=100.0, words=lines[0]) if percent else None

    def finish(self, exit_code: int) -> str | None:
        """Add the results to the output."""
        if exit_code or not self._part.is_file():
            return f"failed with exit code {exit_code}"
        evaluation = read_evaluation(self._part)
        known = {result.length: result for result in (*self._known_results(), *evaluation.results)}
        results = tuple(known[length] for length in sorted(known))
        question, model = self._question(), self._model()
        write_evaluation(dataclasses.replace(evaluation, results=results, question=question, model=model), self.output)
        self._part.unlink()
        self.log.unlink()  # the output says it all
        return None

    def is_finished(self) -> bool:
        """Return whether the output has every length, of this checkpoint, text and protocol."""
        return set(self.lengths) <= {result.length for result in self._known_results()}

    @property
    def _lengths(self) -> str:
        return ",".join(map(str, self.lengths))

    @property
    def _part(self) -> Path:
        return self.output.with_name(f"{self.output.stem}_{self._lengths}.part")

    def _question(self) -> dict[str, Any]:
        """Return what the results depend on besides the model and the length."""
        return {"data": self.data, "protocol": self.protocol, "stride": self.stride, "tokens": self.tokens}

    def _model(self) -> str:
        """Return what only this very checkpoint has: the checksum of its files' checksums."""
        return (self.checkpoint / MANIFEST_CHECKSUM).read_text(encoding="utf-8")

    def _known_results(self) -> tuple[EvaluationResult, ...]:
        try:
            old = read_evaluation(self.output)
            same = old.question == self._question() and old.model == self._model()
            return old.results if same else ()
        except (OSError, UserError):
            return ()


def run_scorings(scorings: Sequence[Scoring], console: Console) -> None:
    """Evaluate what is not evaluated yet.

    Args:
        scorings: All on the same machine.
        console: Where to show progress.

    Raises:
        ConfigError: An evaluation failed, after the others have ended.
    """
    missing = [scoring for scoring in scorings if not scoring.is_finished()]
    known = len(scorings) - len(missing)
    if known:
        console.print(f"{known} of {len(scorings)} evaluations known already", highlight=False, soft_wrap=True)
    if missing:
        run_jobs(missing, at_once=missing[0].machine.jobs, console=console)
