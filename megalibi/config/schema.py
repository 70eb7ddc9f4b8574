"""What a run is: one frozen dataclass per concern, a docstring under each field.

``__post_init__`` only checks, and only what one section can know of itself; what needs two sections or the number of
ranks is in derive.py. Units are in the names. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from megalibi.config.errors import ConfigError

POSITION_METHODS = ("alibi", "sinusoidal", "rotary", "t5_bias", "learned", "none")
ACTIVATIONS = ("gelu", "relu")
PRECISIONS = ("fp32", "bf16", "fp16")
RECOMPUTATIONS = ("none", "full")
OPTIMIZERS = ("adamw", "nesterov")


def _check_at_least(section: str, minimum: float, **fields: float) -> None:
    for name, value in fields.items():
        if not (math.isfinite(value) and value >= minimum):
            raise ConfigError(f"{section}.{name}={value} is not allowed: a number of at least {minimum} is")


def _check_one_of(section: str, name: str, value: Any, allowed: Iterable[Any]) -> None:
    if value not in allowed:
        raise ConfigError(f"{section}.{name}={value} is not allowed: one of {', '.join(map(str, allowed))} is")


def _check_fraction(section: str, **fields: float) -> None:
    for name, value in fields.items():
        if not 0.0 <= value < 1.0:
            raise ConfigError(f"{section}.{name}={value} is not allowed: a number from 0 up to, but not, 1 is")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: a pre-norm GPT."""

    num_layers: int
    """Number of transformer blocks."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Attention heads of the whole model; the tensor group divides them. Any count: powers of two are not needed."""
    ffn_hidden_size: int
    """Width of the feed-forward layer; 4 x hidden_size in the paper's models."""
    vocab_size: int
    """Token ids are below this number; at least the tokenizer's."""
    padded_vocab_size: int = 0
    """Rows of the embedding table. 0: the next multiple of 128 x tensor_parallel_size. Padded rows never get
    probability. Fix it to keep one table size over several tensor_parallel_size."""
    position_method: str = "alibi"
    """How the model knows order: alibi (arXiv:2108.12409), sinusoidal (arXiv:1706.03762, section 3.5), rotary
    (arXiv:2104.09864), t5_bias (arXiv:1910.10683, section 2.1), learned (a row for every position) or none."""
    max_position_embeddings: int = 0
    """Rows of learned positions, and so the most tokens that such a model sees at once. Only for learned, which needs
    it; no other method has a length cap."""
    t5_num_buckets: int = 32
    """Buckets of distances of t5_bias; the first half of them hold one distance each."""
    t5_max_distance: int = 128
    """From this distance on all share t5_bias's last bucket."""
    activation: str = "gelu"
    """Of the feed-forward layer: gelu (the exact one, by erf) or relu."""
    bias: bool = False
    """Biases in linear layers and layer norms. Off, the model exports exactly to bias-free ALiBi formats."""
    tie_embeddings: bool = True
    """Use the embedding table as the output layer's weight too."""
    adaptive_cutoffs: tuple[int, ...] = ()
    """Where the vocabulary, sorted by falling frequency, is cut into bands of an adaptive embedding (arXiv:1809.10853)
    and softmax (arXiv:1609.04309); WikiText-103's are 20000 and 60000. Empty: one table for all tokens."""
    adaptive_factor: int = 4
    """Each adaptive band's rows are narrower than those of the band before by this factor."""
    final_norm: bool = True
    """A layer norm between the last block and the output layer."""
    dropout: float = 0.0
    """Probability of dropping after the embedding, on attention probabilities and before each residual sum."""
    attention_dropout: float | None = None
    """The same on attention probabilities alone; none: as ``dropout``."""
    activation_dropout: float = 0.0
    """The same after the activation of the feed-forward layer."""
    adaptive_softmax_dropout: float = 0.0
    """The same before the adaptive softmax, and on the narrow hidden states of its later bands."""
    attention_backend: str = "auto"
    """Back end of alibi_attention; `python -m alibi_attention` lists them. auto takes the best that can run."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in layer norms."""
    init_std: float = 0.02
    """Standard deviation of initial weights; layers that write to the residual stream get init_std / sqrt(2 x layers)
    (GPT-2, section 2.3). Adaptive tables and projections have theirs from their shapes, as in fairseq."""
    recompute: str = "none"
    """Activation checkpointing: none, or full (each block keeps only its input and is computed again in backward)."""

    def __post_init__(self) -> None:
        """Check what one section can know."""
        for name in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "vocab_size"):
            _check_at_least("model", 1, **{name: getattr(self, name)})
        _check_one_of("model", "position_method", self.position_method, POSITION_METHODS)
        _check_one_of("model", "activation", self.activation, ACTIVATIONS)
        _check_one_of("model", "recompute", self.recompute, RECOMPUTATIONS)
        for name in ("dropout", "attention_dropout", "activation_dropout", "adaptive_softmax_dropout"):
            _check_fraction("model", **{name: getattr(self, name) or 0.0})
        _check_at_least("model", 0.0, init_std=self.init_std, layer_norm_epsilon=self.layer_norm_epsilon)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.num_attention_heads={self.num_attention_heads} does not divide "
                f"model.hidden_size={self.hidden_size}"
            )
        if self.padded_vocab_size and self.padded_vocab_size < self.vocab_size:
            raise ConfigError(
                f"model.padded_vocab_size={self.padded_vocab_size} is below model.vocab_size={self.vocab_size}: "
                "0 (computed) or at least model.vocab_size is allowed"
            )
        self._check_positions()
        self._check_adaptive()

    @property
    def attention_dropout_probability(self) -> float:
        """What is dropped of attention probabilities."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    def _check_adaptive(self) -> None:
        cutoffs = self.adaptive_cutoffs
        if any(low >= high for low, high in pairwise((0, *cutoffs, self.vocab_size))):
            raise ConfigError(
                f"model.adaptive_cutoffs={list(cutoffs)} is not allowed: rising numbers between 0 and model.vocab_size="
                f"{self.vocab_size} are"
            )
        _check_at_least("model", 1, adaptive_factor=self.adaptive_factor)
        if self.hidden_size < self.adaptive_factor ** len(cutoffs):
            raise ConfigError(
                f"model.adaptive_factor={self.adaptive_factor} leaves the last of {len(cutoffs) + 1} bands no width of "
                f"model.hidden_size={self.hidden_size}"
            )
        if cutoffs and self.padded_vocab_size:
            raise ConfigError(
                f"model.padded_vocab_size={self.padded_vocab_size} is not allowed with model.adaptive_cutoffs: each "
                "band is padded on its own; 0 is"
            )

    def _check_positions(self) -> None:
        method, head_dim = self.position_method, self.hidden_size // self.num_attention_heads
        if method == "sinusoidal" and self.hidden_size % 2:
            raise ConfigError(f"model.hidden_size={self.hidden_size} is odd: sinusoidal positions need an even one")
        if method == "rotary" and head_dim % 2:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} over model.num_attention_heads={self.num_attention_heads} is "
                f"{head_dim} a head: rotary positions need an even number"
            )
        if (method == "learned") != (self.max_position_embeddings > 0):
            raise ConfigError(
                f"model.max_position_embeddings={self.max_position_embeddings} with model.position_method={method} is "
                "not allowed: learned needs 1 or more, all others 0"
            )
        _check_at_least("model", 2, t5_num_buckets=self.t5_num_buckets)
        _check_at_least("model", self.t5_num_buckets // 2 + 1, t5_max_distance=self.t5_max_distance)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One token file of a blend."""

    prefix: str
    """Path of the token file without .bin and .idx."""
    weight: float = 1.0
    """Share of the samples, relative to the other weights of the blend: a decimal of a few digits, such as 0.25."""

    def __post_init__(self) -> None:
        """Check the weight."""
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(f"data weight {self.weight} of {self.prefix} is not allowed: a number above 0 is")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text, as token files."""

    train: tuple[DatasetConfig, ...]
    """A PREFIX, or a list of {prefix, weight}: the token files to train on."""
    valid: tuple[DatasetConfig, ...] = ()
    """The same for the validation loss; none: no validation."""
    tokenizer: str | None = None
    """What the token files were made with, T.model (sentencepiece) or T.words; its vocabulary is checked against the
    model's."""
    seq_length: int
    """Tokens per training sample. The model itself has no length cap."""
    document_mask: bool = False
    """Keep attention inside each document; off, a sample's documents see those before them (as in GPT-2 and 3)."""

    def __post_init__(self) -> None:
        """Check what one section can know."""
        _check_at_least("data", 1, seq_length=self.seq_length)
        if not self.train:
            raise ConfigError("data.train is empty: a PREFIX or a list of {prefix, weight} is allowed")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks share one model. Data-parallel ranks are what is left of the world."""

    tensor_parallel_size: int = 1
    """Ranks over which each layer is cut (arXiv:1909.08053); consecutive ranks, so keep it within a host."""
    sequence_parallel: bool = False
    """Also cut the activations between the layers along the sequence (arXiv:2205.05198): less memory, same result."""
    context_parallel_size: int = 1
    """Ranks that share one sequence's attention. Only 1 for now."""
    timeout_minutes: float = 30.0
    """A collective that waits longer than this ends the run with an error."""

    def __post_init__(self) -> None:
        """Check what one section can know."""
        _check_at_least("parallel", 1, tensor_parallel_size=self.tensor_parallel_size)
        _check_at_least("parallel", 0.01, timeout_minutes=self.timeout_minutes)
        _check_one_of("parallel", "context_parallel_size", self.context_parallel_size, (1,))


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """DeepSpeed ZeRO (arXiv:1910.02054) over the data-parallel ranks."""

    stage: int = 1
    """0: nothing is cut; 1: optimizer states; 2: and gradients; 3: and weights."""
    bucket_elements: int = 100_000_000
    """Elements per reduction and gathering bucket. Larger is faster and takes more memory."""

    def __post_init__(self) -> None:
        """Check what one section can know."""
        _check_one_of("zero", "stage", self.stage, (0, 1, 2, 3))
        _check_at_least("zero", 1, bucket_elements=self.bucket_elements)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, with linear warm-up and cosine decay; matrices decay, vectors do not."""

    kind: str = "adamw"
    """adamw (arXiv:1711.05101), or nesterov: Nesterov's momentum as fairseq's nag, with decoupled decay."""

    learning_rate: float
    """At the end of the warm-up."""
    min_learning_rate: float = 0.0
    """At the end of the decay, and after."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    warmup_init_learning_rate: float = 0.0
    """Where it rises from."""
    decay_steps: int = 0
    """Step at which min_learning_rate is reached; 0: train.steps."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the denominator."""
    momentum: float = 0.99
    """Of nesterov."""
    clip_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""

    def __post_init__(self) -> None:
        """Check what one section can know."""
        _check_one_of("optimizer", "kind", self.kind, OPTIMIZERS)
        for name in ("learning_rate", "min_learning_rate", "warmup_steps", "decay_steps", "weight_decay"):
            _check_at_least("optimizer", 0.0, **{name: getattr(self, name)})
        _check_at_least("optimizer", 0.0, warmup_init_learning_rate=self.warmup_init_learning_rate)
        _check_at_least("optimizer", 0.0, epsilon=self.epsilon, clip_grad_norm=self.clip_grad_norm)
        _check_fraction("optimizer", beta1=self.beta1, beta2=self.beta2, momentum=self.momentum)
        for name in ("min_learning_rate", "warmup_init_learning_rate"):
            if getattr(self, name) > self.learning_rate:
                raise ConfigError(
                    f"optimizer.{name}={getattr(self, name)} is above optimizer.learning_rate={self.learning_rate}"
                )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    steps: int
    """Optimizer steps of the whole run, resumed ones included."""
    global_batch_size: int
    """Sequences per optimizer step, over all data-parallel ranks and micro batches."""
    micro_batch_size: int
    """Sequences that one rank computes at once."""
    output_dir: str
    """The run's folder: config.yaml, metrics.jsonl, checkpoints/, tensorboard/, report.html."""
    seed: int = 1234
    """Initial weights, data order and dropout are functions of it, on any number of ranks."""
    precision: str = "bf16"
    """bf16 (fp32 master weights, accumulation and reduction), fp16 (dynamic loss scale) or fp32."""
    log_every_steps: int = 10
    """Steps between lines on the console; metrics.jsonl has every step."""
    eval_every_steps: int = 0
    """Steps between validation losses; 0: only at the end."""
    eval_samples: int = 256
    """Sequences of data.valid per validation loss; always the same ones, from the first on."""

    def __post_init__(self) -> None:
        """Check what one section can know."""
        for name in ("steps", "global_batch_size", "micro_batch_size", "log_every_steps", "eval_samples"):
            _check_at_least("train", 1, **{name: getattr(self, name)})
        _check_at_least("train", 0, eval_every_steps=self.eval_every_steps, seed=self.seed)
        _check_one_of("train", "precision", self.precision, PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What survives."""

    every_steps: int = 1000
    """Steps between checkpoints; one is also written at the end and on a signal. 0: only then."""
    keep: int = 3
    """Newest checkpoints kept; 0: all."""
    resume: str = "auto"
    """auto: from the run's latest checkpoint, if there is one; none: only into a folder without checkpoints; or the
    path of another run's checkpoint to begin from, as long as this run has none of its own."""

    def __post_init__(self) -> None:
        """Check what one section can know."""
        _check_at_least("checkpoint", 0, every_steps=self.every_steps, keep=self.keep)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
