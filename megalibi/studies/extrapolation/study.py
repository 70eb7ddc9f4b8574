"""Train short, test long (arXiv:2108.12409, Figure 4): which models are trained, and at which lengths they are scored.

One model is trained for each position method, all at the same length, and evaluated at that length and at longer ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megalibi.config import Config
from megalibi.config.model import POSITION_METHODS
from megalibi.errors import ConfigError

EXTRAPOLATION_FILES = ("results.json", "table.md", "figure.png")
"""The files of a study's results."""
NONOVERLAPPING, SLIDING = PROTOCOLS = ("nonoverlapping", "sliding")
METHOD_NAMES = {
    "sinusoidal": "sinusoidal",
    "rotary": "rotary",
    "t5_bias": "T5 bias",
    "alibi": "ALiBi",
    "learned": "learned",
    "none": "none",
}
"""Position method -> its name in tables and pictures, in the order in which they list the methods."""

Perplexities = Mapping[int, float]
"""Evaluation length -> perplexity."""
Curves = Mapping[str, Mapping[str, Perplexities]]
"""Protocol -> position method -> perplexities."""


@dataclass(frozen=True, kw_only=True)
class ExtrapolationStudy:
    """The section ``study`` of an extrapolation study."""

    methods: tuple[str, ...]
    """Position methods; one model is trained with each."""
    lengths: tuple[int, ...]
    """Evaluation lengths in tokens, rising; the first is the training length."""
    stride: int
    """Tokens between the starts of two windows of sliding evaluation."""
    nonoverlapping_tokens: int
    """Tokens of data.valid that nonoverlapping evaluation scores."""
    sliding_tokens: int
    """Tokens of data.valid that sliding evaluation scores; each takes length / stride times as long."""
    ranks: int = 1
    """The number of processes of each training."""

    def __post_init__(self) -> None:
        """Check what can be checked without the run's own sections."""
        for method in self.methods:
            if method not in POSITION_METHODS:
                raise ConfigError(f"study.methods={method}: must be some of {', '.join(POSITION_METHODS)}")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ConfigError(f"study.methods={list(self.methods)}: must be one or more methods, each named once")
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
            ConfigError: The first of study.lengths is not the training length, or data.valid is not one token file.
        """
        if self.lengths[0] != base.data.seq_length:
            raise ConfigError(
                f"study.lengths={list(self.lengths)}: must begin with the training length, "
                f"data.seq_length={base.data.seq_length}"
            )
        if len(base.data.valid) != 1:
            raise ConfigError(f"data.valid: must be one token file to evaluate on, not {len(base.data.valid)}")

    def lengths_of(self, method: str) -> tuple[int, ...]:
        """Return the lengths at which a method can be evaluated: learned positions end at the training length."""
        return self.lengths[:1] if method == "learned" else self.lengths

    def tokens_of(self, protocol: str) -> int:
        """Return how many tokens of the text a protocol scores."""
        return self.nonoverlapping_tokens if protocol == NONOVERLAPPING else self.sliding_tokens


def method_config(base: Config, method: str) -> Config:
    """Return the run of a method: the study's run with these positions, in a folder of its own."""
    cap = base.data.seq_length if method == "learned" else 0
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, position_method=method, max_position_embeddings=cap),
        train=dataclasses.replace(base.train, output_dir=str(Path(base.train.output_dir) / method)),
    )
