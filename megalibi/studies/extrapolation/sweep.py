"""The sweep of an extrapolation study: each method's learning rate, by validation loss at the training length alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megalibi.config import NO_WEIGHT_DEPENDS_ON, Config
from megalibi.errors import DivergenceError
from megalibi.metrics.records import read_metrics
from megalibi.report.markdown import format_table
from megalibi.studies.extrapolation.study import METHOD_NAMES, ExtrapolationStudy, method_config
from megalibi.studies.machinery.trainings import find_divergence

FREE = NO_WEIGHT_DEPENDS_ON - {"data.valid", "data.tokenizer", "train.eval_samples"}
"""Fields in which runs may differ whose validation losses are compared."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a method's learning rates gave at the first seed."""

    losses: Mapping[float, float]
    """Learning rate -> validation loss after the last step, in nats per token, by rising rate; inf: it has diverged."""

    @property
    def chosen(self) -> float:
        """The learning rate with the lowest loss; of equals the lowest rate."""
        return min(self.losses, key=self.losses.__getitem__)

    @property
    def is_at_edge(self) -> bool:
        """Whether a better rate may lie outside of the sweep: the chosen one is its lowest or its highest."""
        return len(self.losses) > 1 and self.chosen in (min(self.losses), max(self.losses))

    def __str__(self) -> str:
        """Return the chosen rate and the losses of all rates, as a command prints them."""
        losses = ", ".join(f"{format_loss(loss)} with {rate:g}" for rate, loss in self.losses.items())
        return f"learning rate {self.chosen:g}{self.edge_note}; validation loss {losses}"

    @property
    def edge_note(self) -> str:
        """The words to put behind the chosen rate where it is at the edge of the sweep; else none."""
        return " at the edge of the sweep" * self.is_at_edge


def format_loss(loss: float) -> str:
    """Return a loss in words: that of a run that has diverged has no digits."""
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def read_sweeps(study: ExtrapolationStudy, base: Config) -> dict[str, Sweep]:
    """Return the sweep of each method, from the metrics of its runs, which have ended.

    Args:
        study: The section ``study``.
        base: The study's run.

    Raises:
        DivergenceError: A method has diverged with every learning rate.
    """
    sweeps = {
        method: Sweep(losses={rate: _last_loss(base, method, rate, study.seeds[0]) for rate in study.learning_rates})
        for method in study.methods
    }
    for method, sweep in sweeps.items():
        if math.isinf(sweep.losses[sweep.chosen]):
            raise DivergenceError(f"{method} has diverged with every learning rate: add lower study.learning_rates")
    return sweeps


def _last_loss(base: Config, method: str, learning_rate: float, seed: int) -> float:
    config = method_config(base, method, learning_rate, seed)
    if find_divergence(config) is not None:
        return math.inf
    last = read_metrics(config.train.output_dir).validations[-1]
    assert last.step == config.train.steps, config.train.output_dir  # every run validates after its last step
    return last.validation_loss if math.isfinite(last.validation_loss) else math.inf


def format_sweeps(sweeps: Mapping[str, Sweep]) -> Iterator[str]:
    """Yield the lines of the Markdown table: a row for each method, a column for each learning rate.

    Args:
        sweeps: The sweep of each method; all have the same learning rates.
    """
    rates = next(iter(sweeps.values())).losses
    rows = []
    for method, sweep in ((m, sweeps[m]) for m in METHOD_NAMES if m in sweeps):
        cells = [
            f"**{format_loss(loss)}**" if rate == sweep.chosen else format_loss(loss)
            for rate, loss in sweep.losses.items()
        ]
        rows.append([METHOD_NAMES[method], *cells, f"{sweep.chosen:g}{sweep.edge_note}"])
    yield from format_table(["", *(f"{rate:g}" for rate in rates), "chosen"], rows)
    yield ""
    yield (
        "Validation loss at the training length, in nats per token, by learning rate, at the first seed; the lowest, "
        "in bold, decides a method's rate, and nothing else does. It is taken on the beginning of the text that is "
        "scored below."
    )
