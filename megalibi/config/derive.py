"""What follows from a configuration and the number of ranks: computed here, once, and checked before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from megalibi.config.checks import refuse
from megalibi.config.model import ModelConfig
from megalibi.config.schema import Config, OptimizerConfig

VOCAB_MULTIPLE_PER_RANK = 128
"""The embedding table's rows per tensor rank are a multiple of this: matrix units like it (Megatron-LM's value)."""


@dataclass(frozen=True, kw_only=True)
class Derived:
    """The numbers that follow from a Config on a number of ranks."""

    world_size: int
    """The number of ranks of the job."""
    data_parallel_size: int
    """The number of data-parallel ranks, which see different data."""
    accumulation_steps: int
    """The number of micro batches of each rank in an optimizer step."""
    padded_vocab_size: int
    """The rows of the whole embedding table, or of the tables of all adaptive bands together."""
    batch_tokens: int
    """The number of tokens of an optimizer step, over all ranks."""


def derive(config: Config, world_size: int) -> Derived:
    """Compute and check everything that needs two sections or the number of ranks.

    Args:
        config: The run.
        world_size: The number of ranks of the job.

    Raises:
        ConfigError: The tensor group does not divide the ranks, the heads, the feed-forward width, the vocabulary or
            (sequence parallel) the sequence; or the global batch is not a multiple of micro batch x data ranks.
    """
    tensor, length = config.parallel.tensor_parallel_size, config.data.seq_length
    heads, width = config.model.num_attention_heads, config.model.ffn_hidden_size
    _check_divides(tensor, world_size, f"the job's {world_size} rank{'s' * (world_size > 1)}")
    _check_divides(tensor, heads, f"model.num_attention_heads={heads}")
    _check_divides(tensor, width, f"model.ffn_hidden_size={width}")
    if config.model.adaptive_cutoffs:
        padded = sum(band.padded_size(tensor) for band in adaptive_bands(config.model))
    else:
        padded = config.model.padded_vocab_size or padded_vocab_size(config.model.vocab_size, tensor)
    _check_divides(tensor, padded, f"model.padded_vocab_size={padded}")
    if config.parallel.sequence_parallel:
        _check_divides(tensor, length, f"data.seq_length={length} with parallel.sequence_parallel=true")
    cap = config.model.max_position_embeddings
    if cap and length > cap:
        limit = f"model.max_position_embeddings={cap} with model.position_method=learned"
        refuse("data.seq_length", length, f"be at most {limit}")
    data = world_size // tensor
    per_micro_step = config.train.micro_batch_size * data
    if config.train.global_batch_size % per_micro_step:
        factors = (
            f"train.micro_batch_size={config.train.micro_batch_size} x {data} data-parallel rank{'s' * (data > 1)}"
        )
        requirement = f"be a multiple of {per_micro_step} ({factors})"
        refuse("train.global_batch_size", config.train.global_batch_size, requirement)
    return Derived(
        world_size=world_size,
        data_parallel_size=data,
        accumulation_steps=config.train.global_batch_size // per_micro_step,
        padded_vocab_size=padded,
        batch_tokens=config.train.global_batch_size * config.data.seq_length,
    )


def _check_divides(tensor_parallel_size: int, number: int, what: str) -> None:
    if number % tensor_parallel_size:
        refuse("parallel.tensor_parallel_size", tensor_parallel_size, f"divide {what}")


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """Return the next multiple of 128 x tensor_parallel_size."""
    multiple = VOCAB_MULTIPLE_PER_RANK * tensor_parallel_size
    return math.ceil(vocab_size / multiple) * multiple


@dataclass(frozen=True)
class AdaptiveBand:
    """Tokens of similar frequency, which share a table of one width."""

    start: int
    """The id of the band's first token."""
    stop: int
    """The id after that of the band's last token."""
    width: int
    """The number of columns of the band's table."""

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
        optimizer: The rates, and the lengths of warm-up and decay.
        train_steps: The step at which the decay ends, unless ``decay_steps`` is given.
    """
    if step < optimizer.warmup_steps:
        rise = optimizer.learning_rate - optimizer.warmup_init_learning_rate
        return optimizer.warmup_init_learning_rate + rise * (step + 1) / optimizer.warmup_steps
    decay_steps = (optimizer.decay_steps or train_steps) - optimizer.warmup_steps
    progress = min(1.0, (step - optimizer.warmup_steps) / max(1, decay_steps))
    span = optimizer.learning_rate - optimizer.min_learning_rate
    return optimizer.min_learning_rate + span * 0.5 * (1.0 + math.cos(math.pi * progress))
