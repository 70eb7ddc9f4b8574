"""What follows from a configuration and the number of ranks: computed here, once, and checked before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from megalibi.config.model import ModelConfig
from megalibi.config.schema import Config, OptimizerConfig
from megalibi.errors import ConfigError

VOCAB_MULTIPLE_PER_RANK = 128
"""The embedding table's rows per tensor rank are a multiple of this: matrix units like it (Megatron-LM's value)."""


@dataclass(frozen=True, kw_only=True)
class Derived:
    """Numbers that follow from a Config on a world of ranks."""

    world_size: int
    """Ranks of the job."""
    data_parallel_size: int
    """Ranks that see different data."""
    accumulation_steps: int
    """Micro batches per rank and optimizer step."""
    padded_vocab_size: int
    """Rows of the whole embedding table, or of all adaptive bands' together."""
    batch_tokens: int
    """Tokens per optimizer step."""


def derive(config: Config, world_size: int) -> Derived:
    """Compute and check everything that needs two sections or the number of ranks.

    Args:
        config: The run.
        world_size: Ranks of the job.

    Raises:
        ConfigError: The tensor group does not divide the ranks, the heads, the feed-forward width, the vocabulary or
            (sequence parallel) the sequence; or the global batch is no multiple of micro batch x data ranks.
    """
    tensor = config.parallel.tensor_parallel_size
    _check_divides(tensor, "the number of ranks", world_size)
    _check_divides(tensor, "model.num_attention_heads", config.model.num_attention_heads)
    _check_divides(tensor, "model.ffn_hidden_size", config.model.ffn_hidden_size)
    if config.model.adaptive_cutoffs:
        padded = sum(band.padded_size(tensor) for band in adaptive_bands(config.model))
    else:
        padded = config.model.padded_vocab_size or padded_vocab_size(config.model.vocab_size, tensor)
    _check_divides(tensor, "model.padded_vocab_size", padded)
    if config.parallel.sequence_parallel:
        _check_divides(tensor, "data.seq_length", config.data.seq_length, why=" (parallel.sequence_parallel)")
    cap = config.model.max_position_embeddings
    if cap and config.data.seq_length > cap:
        raise ConfigError(
            f"data.seq_length={config.data.seq_length} is above model.max_position_embeddings={cap}: at most {cap} is "
            "allowed with model.position_method=learned"
        )
    data = world_size // tensor
    per_micro_step = config.train.micro_batch_size * data
    if config.train.global_batch_size % per_micro_step:
        raise ConfigError(
            f"train.global_batch_size={config.train.global_batch_size} is no multiple of train.micro_batch_size="
            f"{config.train.micro_batch_size} x {data} data-parallel ranks: a multiple of {per_micro_step} is allowed"
        )
    return Derived(
        world_size=world_size,
        data_parallel_size=data,
        accumulation_steps=config.train.global_batch_size // per_micro_step,
        padded_vocab_size=padded,
        batch_tokens=config.train.global_batch_size * config.data.seq_length,
    )


def _check_divides(tensor_parallel_size: int, name: str, value: int, *, why: str = "") -> None:
    if value % tensor_parallel_size:
        raise ConfigError(f"parallel.tensor_parallel_size={tensor_parallel_size} does not divide {name}={value}{why}")


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """Return the next multiple of 128 x tensor_parallel_size."""
    multiple = VOCAB_MULTIPLE_PER_RANK * tensor_parallel_size
    return math.ceil(vocab_size / multiple) * multiple


@dataclass(frozen=True)
class AdaptiveBand:
    """Tokens of like frequency, which share a table of one width.

    Attributes:
        start: Its first token.
        stop: The token after its last one.
        width: Columns of its table.
    """

    start: int
    stop: int
    width: int

    @property
    def size(self) -> int:
        """Return the number of tokens."""
        return self.stop - self.start

    def padded_size(self, tensor_parallel_size: int) -> int:
        """Return the rows of the table: the tokens, padded until the tensor group divides them."""
        return math.ceil(self.size / tensor_parallel_size) * tensor_parallel_size


def adaptive_bands(model: ModelConfig) -> list[AdaptiveBand]:
    """Return the bands of an adaptive embedding and softmax; one band of the full width without cutoffs."""
    return [
        AdaptiveBand(start, stop, model.hidden_size // model.adaptive_factor**number)
        for number, (start, stop) in enumerate(pairwise((0, *model.adaptive_cutoffs, model.vocab_size)))
    ]


def learning_rate_at(step: int, optimizer: OptimizerConfig, train_steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine decay (arXiv:1608.03983, equation 5).

    It is a function of the step alone, so there is no scheduler state to save.

    Args:
        step: The step about to be taken, from 0.
        optimizer: Rates and lengths.
        train_steps: Where the decay ends unless ``decay_steps`` says otherwise.
    """
    if step < optimizer.warmup_steps:
        rise = optimizer.learning_rate - optimizer.warmup_init_learning_rate
        return optimizer.warmup_init_learning_rate + rise * (step + 1) / optimizer.warmup_steps
    decay_steps = (optimizer.decay_steps or train_steps) - optimizer.warmup_steps
    progress = min(1.0, (step - optimizer.warmup_steps) / max(1, decay_steps))
    span = optimizer.learning_rate - optimizer.min_learning_rate
    return optimizer.min_learning_rate + span * 0.5 * (1.0 + math.cos(math.pi * progress))
