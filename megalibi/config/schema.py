"""What a run is: one frozen dataclass per concern, a docstring under each field.

``__post_init__`` only checks, and only what one section can know of itself; what needs two sections or the number of
ranks is in derive.py. Units are in the names. Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megalibi.config.checks import check_at_least, check_at_most, check_fraction, check_one_of
from megalibi.config.model import ModelConfig
from megalibi.errors import ConfigError

PRECISIONS = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "nesterov")
MAX_TIMEOUT_MINUTES = 525_600
"""A year; torch counts in whole numbers that do not hold everything."""
MAX_BUCKET_ELEMENTS = 2**31 - 1
MAX_BATCH_SIZE = 2**24
"""Sequences per step; all their numbers are held at once."""


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
    model's, and its hash against what PREFIX.json says of each file."""
    seq_length: int
    """Tokens per training sample. The model itself has no length cap."""
    document_mask: bool = False
    """Keep attention inside each document; off, a sample's documents see those before them (as in GPT-2 and 3)."""

    def __post_init__(self) -> None:
        """Check what one section can know."""
        check_at_least("data", 1, seq_length=self.seq_length)
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
        check_at_least("parallel", 1, tensor_parallel_size=self.tensor_parallel_size)
        check_at_least("parallel", 0.01, timeout_minutes=self.timeout_minutes)
        check_at_most("parallel", MAX_TIMEOUT_MINUTES, timeout_minutes=self.timeout_minutes)
        check_one_of("parallel", "context_parallel_size", self.context_parallel_size, (1,))


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """DeepSpeed ZeRO (arXiv:1910.02054) over the data-parallel ranks."""

    stage: int = 1
    """0: nothing is cut; 1: optimizer states; 2: and gradients; 3: and weights."""
    bucket_elements: int = 100_000_000
    """Elements per reduction and gathering bucket. Larger is faster and takes more memory. DeepSpeed wants an even
    number: an odd one is rounded up."""

    def __post_init__(self) -> None:
        """Check what one section can know."""
        check_one_of("zero", "stage", self.stage, (0, 1, 2, 3))
        check_at_least("zero", 1, bucket_elements=self.bucket_elements)
        check_at_most("zero", MAX_BUCKET_ELEMENTS, bucket_elements=self.bucket_elements)


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
        check_one_of("optimizer", "kind", self.kind, OPTIMIZERS)
        for name in ("learning_rate", "min_learning_rate", "warmup_steps", "decay_steps", "weight_decay"):
            check_at_least("optimizer", 0.0, **{name: getattr(self, name)})
        check_at_least("optimizer", 0.0, warmup_init_learning_rate=self.warmup_init_learning_rate)
        check_at_least("optimizer", 0.0, epsilon=self.epsilon, clip_grad_norm=self.clip_grad_norm)
        check_fraction("optimizer", beta1=self.beta1, beta2=self.beta2, momentum=self.momentum)
        if 0 < self.decay_steps < self.warmup_steps:
            raise ConfigError(
                f"optimizer.decay_steps={self.decay_steps} is below optimizer.warmup_steps={self.warmup_steps}: the "
                "learning rate would still rise there; at least as many steps are allowed, or 0 for train.steps"
            )
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
    deterministic: bool = False
    """On a GPU: the same numbers, bit for bit, at every run and resume on GPUs of one kind, by fixed tiles and
    deterministic algorithms, which are slower. On a CPU that is so in any case."""
    log_every_steps: int = 10
    """Steps between lines on the console; metrics.jsonl has every step."""
    eval_every_steps: int = 0
    """Steps between validation losses; 0: only at the end."""
    eval_samples: int = 256
    """Sequences of data.valid per validation loss; always the same ones, from the first on, and none twice: a set of a
    blend that is used up has no more turns."""

    def __post_init__(self) -> None:
        """Check what one section can know."""
        for name in ("steps", "global_batch_size", "micro_batch_size", "log_every_steps", "eval_samples"):
            check_at_least("train", 1, **{name: getattr(self, name)})
        check_at_least("train", 0, eval_every_steps=self.eval_every_steps, seed=self.seed)
        check_at_most("train", MAX_BATCH_SIZE, global_batch_size=self.global_batch_size)
        check_one_of("train", "precision", self.precision, PRECISIONS)
        if not self.output_dir.strip():
            raise ConfigError("train.output_dir is empty: the path of the run's folder is allowed")


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
    accept_other_data: bool = False
    """Go on although data.train is not what the checkpoint was trained on, for data that was mended: a line says so.
    The position in the data stays; what lies there may be other samples."""

    def __post_init__(self) -> None:
        """Check what one section can know."""
        check_at_least("checkpoint", 0, every_steps=self.every_steps, keep=self.keep)


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
