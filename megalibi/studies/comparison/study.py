"""The paper's large comparison (arXiv:2108.12409, section 4.2): ALiBi against sinusoidal positions at twice the length.

This module says what is compared with what: the section ``study``, the models, and how the run of each model follows
from the study's run. Part one (turns.py, speed.py) measures speed and memory, part two (quality.py) trains and
evaluates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megalibi.config import Config
from megalibi.errors import ConfigError
from megalibi.studies.baselines import replace_positions

FIGURE_5 = "figure5.png"
COMPARISON_FILES = ("results.json", "report.md", FIGURE_5)
"""The files of a comparison's results; the picture is the analogue of the paper's Figure 5."""
ALIBI, SINUSOIDAL = "alibi", "sinusoidal"
ATTENTIONS = {"unfused": "unfused", "fast": "auto"}
"""Kind of attention -> model.attention_backend. Unfused attention holds the scores of all pairs of tokens, as the
paper's fairseq did, with products in the run's precision and the softmax in fp32; fast is the best back end that can
run."""


@dataclass(frozen=True, kw_only=True)
class CompareStudy:
    """The section ``study`` of a comparison."""

    lengths: tuple[int, ...] = (512, 1024, 2048)
    """Training lengths in tokens, rising. ALiBi at each is compared with sinusoidal positions at the next."""
    turns: int = 5
    """How many times the speed of each variant is measured, every time in fresh processes. The variants take turns."""
    warm_steps: int = 1
    """Steps at the beginning of a turn whose times do not count."""
    steps_per_turn: int = 3
    """Steps of a turn whose times count."""
    unfused_micro_batch_size: int = 0
    """train.micro_batch_size of the turns with unfused attention, whose scores fill the memory. 0 means the same as
    in the other turns."""
    ranks: int = 1
    """Processes of each training and of each turn."""
    valid_tokens: int = 131072
    """Tokens of data.valid on which the checkpoints are evaluated."""

    def __post_init__(self) -> None:
        """Check what can be checked without the run's own sections."""
        for name in ("turns", "warm_steps", "steps_per_turn", "ranks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"study.{name}={getattr(self, name)}: must be at least 1")
        if self.unfused_micro_batch_size < 0:
            raise ConfigError(f"study.unfused_micro_batch_size={self.unfused_micro_batch_size}: must be 0 or more")
        if len(self.lengths) < 2 or list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] < 1:
            raise ConfigError(f"study.lengths={list(self.lengths)}: must be two or more rising lengths above 0")
        if self.valid_tokens <= self.longest_evaluation:
            raise ConfigError(
                f"study.valid_tokens={self.valid_tokens}: must be more than {self.longest_evaluation}, four times the "
                "longest of study.lengths"
            )

    @property
    def longest_evaluation(self) -> int:
        """Tokens of the longest evaluation window: ALiBi goes up to four times the longest training length."""
        return 4 * self.lengths[-1]

    def models(self) -> list[ComparedModel]:
        """Return the models that are trained: both methods at every length, as in the rows of Table 12."""
        return [
            ComparedModel(method=method, length=length) for length in self.lengths for method in (SINUSOIDAL, ALIBI)
        ]

    def pairs(self) -> list[tuple[ComparedModel, ComparedModel]]:
        """Return the pairs: ALiBi at a length, sinusoidal positions at the next. The last pair is the main one."""
        return [
            (ComparedModel(method=ALIBI, length=short), ComparedModel(method=SINUSOIDAL, length=long))
            for short, long in zip(self.lengths, self.lengths[1:], strict=False)
        ]


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """One of the models compared: a position method at a training length."""

    method: str
    """The position method, ALIBI or SINUSOIDAL."""
    length: int
    """The training length in tokens."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.method}_{self.length}"

    def __str__(self) -> str:
        """Return the name of the model in tables and sentences."""
        return f"{'ALiBi' if self.method == ALIBI else self.method}, {self.length:,}"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model with a kind of attention, whose speed is measured."""

    model: ComparedModel
    """The model whose kind of attention varies."""
    attention: str
    """The kind of attention, a key of ATTENTIONS."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.model.name}_{self.attention}"


def variants(study: CompareStudy) -> Iterator[Variant]:
    """Yield every model with every kind of attention."""
    for attention in ATTENTIONS:
        for model in study.models():
            yield Variant(model=model, attention=attention)


def model_config(base: Config, model: ComparedModel) -> Config:
    """Return the run of a model: the study's run, with as many tokens in each update, micro batch and validation.

    Args:
        base: The study's configuration.
        model: The model to train.

    Raises:
        ConfigError: The length does not divide the tokens of a batch.
    """
    return dataclasses.replace(
        base,
        model=replace_positions(base.model, model.method),
        data=dataclasses.replace(base.data, seq_length=model.length),
        train=dataclasses.replace(
            base.train,
            global_batch_size=_sequences(base, "global_batch_size", model.length),
            micro_batch_size=_sequences(base, "micro_batch_size", model.length),
            eval_samples=_sequences(base, "eval_samples", model.length),
            output_dir=str(Path(base.train.output_dir) / model.name),
        ),
    )


def _sequences(base: Config, name: str, length: int) -> int:
    sequences, base_length = getattr(base.train, name), base.data.seq_length
    if sequences * base_length % length:
        raise ConfigError(
            f"train.{name}={sequences}: times data.seq_length={base_length} it must be a multiple of the {length} of "
            "study.lengths, so that every length has the same number of tokens"
        )
    return sequences * base_length // length


def variant_config(base: Config, study: CompareStudy, variant: Variant) -> Config:
    """Return the run of a turn: the model's run, with the variant's kind of attention and the steps of a turn.

    Micro batches have as many tokens at every length, but with unfused attention they may be smaller.

    Args:
        base: The study's configuration.
        study: Its section ``study``.
        variant: The variant to measure.
    """
    micro_batch_size = base.train.micro_batch_size
    if variant.attention == "unfused":
        micro_batch_size = study.unfused_micro_batch_size or micro_batch_size
    sized = dataclasses.replace(base, train=dataclasses.replace(base.train, micro_batch_size=micro_batch_size))
    config = model_config(sized, variant.model)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, attention_backend=ATTENTIONS[variant.attention]),
        train=dataclasses.replace(
            config.train,
            steps=study.warm_steps + study.steps_per_turn,
            output_dir=str(Path(base.train.output_dir) / "speed" / variant.name),
        ),
    )
