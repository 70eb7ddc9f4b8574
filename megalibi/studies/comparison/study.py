"""The paper's large comparison (arXiv:2108.12409, section 4.2): ALiBi against sinusoidal positions at twice the length.

What is compared with what: the study's section, the models and how each one's run follows from the study's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megalibi.config import Config
from megalibi.errors import ConfigError

ALIBI, SINUSOIDAL = "alibi", "sinusoidal"
ATTENTIONS = {"unfused": "unfused", "fast": "auto"}
"""Kinds of attention and the back end of each. unfused holds the scores of all pairs of tokens, as the paper's fairseq
did, with products in 16 bits and the softmax in fp32; fast is the best that can run."""


@dataclass(frozen=True, kw_only=True)
class CompareStudy:
    """The section ``study`` of a comparison."""

    lengths: tuple[int, ...] = (512, 1024, 2048)
    """Training lengths, rising. ALiBi at each is compared with sinusoidal positions at the next."""
    turns: int = 5
    """Times that each variant's speed is measured, each in fresh processes; all variants in turn."""
    warm_steps: int = 1
    """Steps at the beginning of a turn that are not counted."""
    steps_per_turn: int = 3
    """Steps of a turn that are counted."""
    unfused_micro_batch_size: int = 0
    """train.micro_batch_size of the turns with unfused attention, whose scores fill the memory; 0: as the others'."""
    ranks: int = 1
    """Processes of a training and of a turn."""
    valid_tokens: int = 131072
    """Tokens of data.valid on which the checkpoints are evaluated."""

    def __post_init__(self) -> None:
        """Check what one section can know."""
        for name in ("turns", "warm_steps", "steps_per_turn", "ranks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"study.{name}={getattr(self, name)} is not allowed: a number of at least 1 is")
        if self.unfused_micro_batch_size < 0:
            raise ConfigError(
                f"study.unfused_micro_batch_size={self.unfused_micro_batch_size} is not allowed: 0 or more is"
            )
        if len(self.lengths) < 2 or list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] < 1:
            raise ConfigError(f"study.lengths={list(self.lengths)} is not allowed: two or more rising lengths are")
        if self.valid_tokens <= self.longest_evaluation:
            raise ConfigError(
                f"study.valid_tokens={self.valid_tokens} is not allowed: more than {self.longest_evaluation}, the "
                "longest evaluation, is"
            )

    @property
    def longest_evaluation(self) -> int:
        """Tokens of the longest window of an evaluation: ALiBi's, at four times the longest training length."""
        return 4 * self.lengths[-1]

    def models(self) -> list[Model]:
        """Return what is trained: both methods at every length, the rows of Table 12."""
        return [Model(method=method, length=length) for length in self.lengths for method in (SINUSOIDAL, ALIBI)]

    def pairs(self) -> list[tuple[Model, Model]]:
        """Return ALiBi at each length with sinusoidal positions at the next; the last pair is the main one."""
        return [
            (Model(method=ALIBI, length=short), Model(method=SINUSOIDAL, length=long))
            for short, long in zip(self.lengths, self.lengths[1:], strict=False)
        ]


@dataclass(frozen=True, kw_only=True)
class Model:
    """One trained model."""

    method: str
    """Of its positions."""
    length: int
    """Tokens it is trained at."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method}_{self.length}"

    def __str__(self) -> str:
        """As tables and sentences call it."""
        return f"{'ALiBi' if self.method == ALIBI else self.method}, {self.length:,}"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model with a kind of attention: what the speed is measured of."""

    model: Model
    attention: str
    """A key of ATTENTIONS."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.model.name}_{self.attention}"


def variants(study: CompareStudy) -> Iterator[Variant]:
    """Yield every model with every kind of attention."""
    for attention in ATTENTIONS:
        for model in study.models():
            yield Variant(model=model, attention=attention)


def model_config(base: Config, model: Model) -> Config:
    """Return the run of a model: the study's own, with as many tokens in each update, micro batch and validation.

    Args:
        base: The study's configuration.
        model: What is trained.

    Raises:
        ConfigError: The length does not divide the tokens of a batch.
    """
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, position_method=model.method),
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
            f"train.{name}={sequences} x data.seq_length={base_length} tokens are no multiple of the {length} of "
            "study.lengths: the same number of tokens at every length is needed"
        )
    return sequences * base_length // length


def variant_config(base: Config, study: CompareStudy, variant: Variant) -> Config:
    """Return the run of a turn: a model's, with the kind of attention, for as many steps as a turn has.

    Micro batches have as many tokens at every length, but with unfused attention they may be smaller.

    Args:
        base: The study's configuration.
        study: Its section.
        variant: What is measured.
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
