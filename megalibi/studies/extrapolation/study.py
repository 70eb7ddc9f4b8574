"""Train short, test long (arXiv:2108.12409, Figure 4): which models are trained, and at which lengths they are scored.

Each position method is trained with several learning rates, all at the same length. The rate with the lowest
validation loss at that length is the method's (sweep.py); with it the method is trained from more seeds. The models of
that rate are evaluated at the training length and at longer ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megalibi.config import Config
from megalibi.config.model import POSITION_METHODS
from megalibi.errors import ConfigError
from megalibi.studies.baselines import replace_positions

EXTRAPOLATION_FILES = ("results.json", "table.md", "figure.png", "figure_by_position.png")
"""The files of a study's results."""
NONOVERLAPPING, SLIDING = PROTOCOLS = ("nonoverlapping", "sliding")
INTERPOLATED = "alibi_interpolated"
"""The curve of ALiBi's models with the slopes of the training times training length / length (arXiv:2310.13017)."""
METHOD_NAMES = {
    "sinusoidal": "sinusoidal",
    "rotary": "rotary",
    "t5_bias": "T5 bias",
    "alibi": "ALiBi",
    INTERPOLATED: "ALiBi interpolated",
    "learned": "learned",
    "none": "none",
}
"""Curve -> its name in tables and pictures, in the order in which they list the curves. A curve has the name of its
models' position method; INTERPOLATED alone is a second one of the same models."""

Perplexities = Mapping[int, float]
"""Evaluation length -> perplexity."""
Curves = Mapping[str, Mapping[str, Perplexities]]
"""Protocol -> curve, by a key of METHOD_NAMES -> perplexities."""
SeedCurves = Mapping[int, Curves]
"""Seed -> the curves of the models that were trained from it; every seed has the same methods and lengths."""


@dataclass(frozen=True, kw_only=True)
class ExtrapolationStudy:
    """The section ``study`` of an extrapolation study."""

    methods: tuple[str, ...]
    """Position methods that are compared."""
    learning_rates: tuple[float, ...]
    """Learning rates of the sweep, rising; each method is trained with each of them at the first seed."""
    seeds: tuple[int, ...]
    """Values of train.seed, of which initial weights and data order are functions; every method is trained from each,
    from all but the first with the best of its learning rates alone."""
    lengths: tuple[int, ...]
    """Evaluation lengths in tokens, rising; the first is the training length."""
    stride: int
    """Tokens between the starts of two windows of sliding evaluation."""
    nonoverlapping_tokens: int
    """Tokens of data.valid that nonoverlapping evaluation scores."""
    sliding_tokens: int
    """Tokens of data.valid that sliding evaluation scores; each takes length / stride times as long."""
    interpolate_slopes: bool = False
    """Whether models of ALiBi, where there are any, are also evaluated with interpolated slopes: a curve of its own."""
    ranks: int = 1
    """The number of processes of each training."""

    def __post_init__(self) -> None:
        """Check what can be checked without the run's own sections."""
        for method in self.methods:
            if method not in POSITION_METHODS:
                raise ConfigError(f"study.methods={method}: must be some of {', '.join(POSITION_METHODS)}")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ConfigError(f"study.methods={list(self.methods)}: must be one or more methods, each named once")
        if not self.learning_rates or list(self.learning_rates) != sorted(set(self.learning_rates)):
            raise ConfigError(f"study.learning_rates={list(self.learning_rates)}: must be one or more rising numbers")
        if not 0.0 < self.learning_rates[0] <= self.learning_rates[-1] < math.inf:
            raise ConfigError(f"study.learning_rates={list(self.learning_rates)}: must be finite and above 0")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(
                f"study.seeds={list(self.seeds)}: must be one or more whole numbers from 0 on, each named once"
            )
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] < 1:
            raise ConfigError(f"study.lengths={list(self.lengths)}: must be rising whole numbers above 0")
        if not 1 <= self.stride <= self.lengths[0]:
            raise ConfigError(f"study.stride={self.stride}: must be 1 to {self.lengths[0]}, the first of study.lengths")
        for name in ("nonoverlapping_tokens", "sliding_tokens"):
            if getattr(self, name) <= self.lengths[-1]:
                raise ConfigError(
                    f"study.{name}={getattr(self, name)}: must be more than {self.lengths[-1]}, the longest of "
                    "study.lengths"
                )
        if self.ranks < 1:
            raise ConfigError(f"study.ranks={self.ranks}: must be at least 1")

    def check_base(self, base: Config) -> None:
        """Check that the section fits the run that it varies.

        Raises:
            ConfigError: The first of study.lengths is not the training length, data.valid is not one token file, or
                the run has no learning rate that others can be a multiple of.
        """
        if self.lengths[0] != base.data.seq_length:
            raise ConfigError(
                f"study.lengths={list(self.lengths)}: must begin with the training length, "
                f"data.seq_length={base.data.seq_length}"
            )
        if len(base.data.valid) != 1:
            raise ConfigError(f"data.valid: must be one token file to evaluate on, not {len(base.data.valid)}")
        if base.optimizer.learning_rate <= 0.0:
            raise ConfigError(
                f"optimizer.learning_rate={base.optimizer.learning_rate}: must be above 0; "
                "optimizer.min_learning_rate keeps its ratio to it at every rate of study.learning_rates"
            )

    @property
    def curves(self) -> tuple[str, ...]:
        """What is evaluated: each method, and ALiBi's models once more if their slopes are to be interpolated."""
        return (*self.methods, *((INTERPOLATED,) if self.interpolate_slopes and "alibi" in self.methods else ()))

    def lengths_of(self, method: str) -> tuple[int, ...]:
        """Return the lengths at which a method can be evaluated: learned positions end at the training length."""
        return self.lengths[:1] if method == "learned" else self.lengths

    def tokens_of(self, protocol: str) -> int:
        """Return how many tokens of the text a protocol scores."""
        return self.nonoverlapping_tokens if protocol == NONOVERLAPPING else self.sliding_tokens


def trained_method(curve: str) -> str:
    """Return the position method of the models that a curve is of."""
    return "alibi" if curve == INTERPOLATED else curve


def method_config(base: Config, method: str, learning_rate: float, seed: int) -> Config:
    """Return one run: the study's, with these positions, learning rate and seed, in a folder of its own.

    The other learning rates of the schedule keep their ratio to the highest; model.scale_embedding is of the sinusoidal
    models alone.

    Args:
        base: The study's run.
        method: The position method.
        learning_rate: The highest learning rate of the schedule.
        seed: The number of which initial weights and data order are functions.
    """
    cap = base.data.seq_length if method == "learned" else 0
    ratio = learning_rate / base.optimizer.learning_rate

    def scale(value: float) -> float:
        return min(float(f"{value * ratio:.12g}"), learning_rate)  # without the last digits, which are rounding errors

    return dataclasses.replace(
        base,
        model=replace_positions(base.model, method, longest=cap),
        optimizer=dataclasses.replace(
            base.optimizer,
            learning_rate=learning_rate,
            min_learning_rate=scale(base.optimizer.min_learning_rate),
            warmup_init_learning_rate=scale(base.optimizer.warmup_init_learning_rate),
        ),
        train=dataclasses.replace(
            base.train,
            seed=seed,
            output_dir=str(Path(base.train.output_dir) / f"{method}_lr_{learning_rate!r}_seed_{seed}"),
        ),
    )
