"""What a run is: one frozen dataclass for each section of its YAML, with a docstring under each field.

Fixed, Said and Free (annotations.py) say what happens when a run resumes with another value of the field.
``__post_init__`` only checks, and only what one section can know of itself; what needs two sections or the number of
ranks is in derive.py. Units are in the names. Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

from megalibi.config.annotations import Decides, Files, Fixed, Free, Said
from megalibi.config.checks import check_at_least, check_at_most, check_fraction, check_one_of, refuse
from megalibi.config.model import ModelConfig
from megalibi.config.sample_ranges import SampleRanges

PRECISIONS = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "nesterov")
ON_NONFINITE = ("stop", "skip")
ON_SPIKE = ("none", "rollback")
MAX_TIMEOUT_MINUTES = 525_600
"""The longest timeout, a year: torch counts it in whole numbers that do not hold everything."""
MAX_HANG_TIMEOUT_SECONDS = 60 * MAX_TIMEOUT_MINUTES
MAX_BUCKET_ELEMENTS = 2**31 - 1
MAX_BATCH_SIZE = 2**24
"""The most sequences of a step: the numbers of all of them are held at once."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One token file of a blend."""

    prefix: str
    """The path of the token file without .bin and .idx."""
    weight: float = 1.0
    """The share of the samples, relative to the other weights of the blend: a decimal of a few digits, such as 0.25."""

    def __post_init__(self) -> None:
        """Check the weight."""
        if not (math.isfinite(self.weight) and self.weight > 0):
            refuse("weight", self.weight, f"be above 0 (in the entry with prefix={self.prefix})")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text that a run learns from, as token files."""

    train: Annotated[Fixed[tuple[DatasetConfig, ...]], Decides.SAMPLES, Files.BY_CONTENT]
    """The token files to train on: a PREFIX, or a list of {prefix, weight}."""
    valid: Annotated[Said[tuple[DatasetConfig, ...]], Decides.NO_WEIGHT, Files.BY_CONTENT] = ()
    """The token files of the validation loss: a PREFIX, or a list of {prefix, weight}. Without them nothing is
    validated."""
    tokenizer: Annotated[Fixed[str | None], Decides.NO_WEIGHT, Files.BY_CONTENT] = None
    """The path of the tokenizer that made the token files: T.model (sentencepiece) or T.words. Its vocabulary is
    checked against the model's, and its hash against what PREFIX.json says of each file; null checks neither."""
    seq_length: Annotated[Fixed[int], Decides.SAMPLES]
    """The number of tokens of a training sample. The model itself has no length cap."""
    document_mask: Fixed[bool] = False
    """Whether attention stays inside each document; if not, a sample's documents see those before them, as in GPT-2
    and GPT-3."""
    skip: Annotated[Said[tuple[str, ...]], Decides.SAMPLES] = ()
    """The samples of data.train that are left out, as ranges of their numbers: [128-135,400]. A number is a place in
    the order of the data, from 0, and the log names those of a bad batch; the samples after it move up. When a run
    resumes, only samples that lie ahead can be added or taken away."""

    def __post_init__(self) -> None:
        """Check what one section can know of itself."""
        check_at_least("data", 1, seq_length=self.seq_length)
        SampleRanges.parse(self.skip)
        if not self.train:
            refuse("data.train", [], "be a PREFIX or a list of {prefix, weight}")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks share one model. The data-parallel size is the number of all ranks over tensor_parallel_size."""

    tensor_parallel_size: Annotated[Said[int], Decides.TOPOLOGY] = 1
    """The number of ranks over which each layer is cut (arXiv:1909.08053). They are consecutive ranks, so keep the
    number within a host."""
    sequence_parallel: Annotated[Said[bool], Decides.TOPOLOGY] = False
    """Whether the activations between the layers are cut along the sequence too (arXiv:2205.05198), which takes less
    memory for the same result."""
    context_parallel_size: Annotated[Fixed[int], Decides.TOPOLOGY] = 1
    """The number of ranks that share one sequence's attention; only 1 can be used so far."""
    timeout_minutes: Free[float] = 30.0
    """The minutes after which a collective that still waits ends the run with an error."""

    def __post_init__(self) -> None:
        """Check what one section can know of itself."""
        check_at_least("parallel", 1, tensor_parallel_size=self.tensor_parallel_size)
        check_at_least("parallel", 0.01, timeout_minutes=self.timeout_minutes)
        check_at_most("parallel", MAX_TIMEOUT_MINUTES, timeout_minutes=self.timeout_minutes)
        check_one_of("parallel", "context_parallel_size", self.context_parallel_size, (1,))


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """DeepSpeed ZeRO (arXiv:1910.02054), which cuts the state of training over the data-parallel ranks."""

    stage: Annotated[Said[int], Decides.TOPOLOGY] = 1
    """What is cut over the data-parallel ranks: 0 cuts nothing, 1 the optimizer's states, 2 the gradients as well, and
    3 the weights as well."""
    bucket_elements: Annotated[Said[int], Decides.TOPOLOGY] = 100_000_000
    """The number of elements that are reduced or gathered at once. More is faster and takes more memory. DeepSpeed
    wants an even number, so an odd one is rounded up."""

    def __post_init__(self) -> None:
        """Check what one section can know of itself."""
        check_one_of("zero", "stage", self.stage, (0, 1, 2, 3))
        check_at_least("zero", 1, bucket_elements=self.bucket_elements)
        check_at_most("zero", MAX_BUCKET_ELEMENTS, bucket_elements=self.bucket_elements)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, its linear warm-up and its cosine decay.

    What DeepSpeed and torch take from a checkpoint is Fixed: another value would be ignored without a word.
    """

    kind: Fixed[str] = "adamw"
    """The optimizer: adamw (arXiv:1711.05101), or nesterov, Nesterov's momentum as fairseq's nag with decoupled weight
    decay."""
    learning_rate: Said[float]
    """The learning rate at the end of the warm-up, the highest of the run."""
    min_learning_rate: Said[float] = 0.0
    """The learning rate at the end of the decay, and after it."""
    warmup_steps: Said[int] = 0
    """The number of steps over which the learning rate rises linearly."""
    warmup_init_learning_rate: Said[float] = 0.0
    """The learning rate from which the warm-up rises."""
    decay_steps: Said[int] = 0
    """The step at which the learning rate reaches min_learning_rate; 0 takes train.steps."""
    weight_decay: Fixed[float] = 0.1
    """The decoupled weight decay of matrices, 0.1 as in GPT-3 (arXiv:2005.14165, appendix B); vectors do not decay."""
    beta1: Fixed[float] = 0.9
    """The decay of adamw's first moment, 0.9 as in GPT-3 (arXiv:2005.14165, appendix B)."""
    beta2: Fixed[float] = 0.95
    """The decay of adamw's second moment, 0.95 as in GPT-3 (arXiv:2005.14165, appendix B)."""
    epsilon: Fixed[float] = 1e-8
    """The number added to the denominator of adamw, 1e-8 as in GPT-3 (arXiv:2005.14165, appendix B)."""
    momentum: Fixed[float] = 0.99
    """The momentum of nesterov; adamw does not use it."""
    clip_grad_norm: Fixed[float] = 1.0
    """The global norm to which larger gradients are scaled down, 1 as in GPT-3; 0 never scales them."""

    def __post_init__(self) -> None:
        """Check what one section can know of itself."""
        check_one_of("optimizer", "kind", self.kind, OPTIMIZERS)
        for name in ("learning_rate", "min_learning_rate", "warmup_steps", "decay_steps", "weight_decay"):
            check_at_least("optimizer", 0, **{name: getattr(self, name)})
        check_at_least("optimizer", 0, warmup_init_learning_rate=self.warmup_init_learning_rate)
        check_at_least("optimizer", 0, epsilon=self.epsilon, clip_grad_norm=self.clip_grad_norm)
        check_fraction("optimizer", beta1=self.beta1, beta2=self.beta2, momentum=self.momentum)
        if 0 < self.decay_steps < self.warmup_steps:
            warmup = f"optimizer.warmup_steps={self.warmup_steps}, until which the learning rate rises"
            refuse("optimizer.decay_steps", self.decay_steps, f"be 0, for train.steps, or at least {warmup}")
        for name in ("min_learning_rate", "warmup_init_learning_rate"):
            if getattr(self, name) > self.learning_rate:
                requirement = f"be at most optimizer.learning_rate={self.learning_rate}"
                refuse(f"optimizer.{name}", getattr(self, name), requirement)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop: how many steps of how many sequences, and what is written of them."""

    steps: Said[int]
    """The number of optimizer steps of the whole run, those before a resume included."""
    global_batch_size: Annotated[Fixed[int], Decides.SAMPLES]
    """The number of sequences of an optimizer step, over all data-parallel ranks and micro batches."""
    micro_batch_size: Annotated[Said[int], Decides.TOPOLOGY]
    """The number of sequences that one rank computes at once."""
    output_dir: Free[str]
    """The path of the run's folder: config.yaml, metrics.jsonl, checkpoints/, tensorboard/ and report.html."""
    seed: Annotated[Fixed[int], Decides.SAMPLES] = 1234
    """The number of which initial weights, data order and dropout are functions, the same on any number of ranks."""
    precision: Fixed[str] = "bf16"
    """The precision of the model's computations: bf16 (with fp32 master weights, accumulation and reduction), fp16
    (with a dynamic loss scale) or fp32."""
    deterministic: Said[bool] = False
    """Whether a GPU gives the same numbers, bit for bit, at every run and resume on GPUs of one kind, by fixed tiles
    and deterministic algorithms, which are slower. A CPU does so in any case."""
    log_every_steps: Free[int] = 10
    """The number of steps between two lines on the console; metrics.jsonl has every step."""
    eval_every_steps: Free[int] = 0
    """The number of steps between two validation losses; 0 validates only after the last step."""
    eval_samples: Annotated[Said[int], Decides.NO_WEIGHT] = 256
    """The number of sequences of data.valid in a validation loss: always the first ones, and none of them twice, so
    that a blend's set that is used up has no more turns."""
    on_nonfinite: Free[str] = "stop"
    """What happens when the loss or the gradient is not finite, before the weights are changed: stop ends the run, skip
    goes on with the next batch. In fp16 a smaller loss scale is tried first."""
    max_consecutive_skips: Free[int] = 3
    """The number of steps in a row that on_nonfinite=skip leaves out; at one more the run stops, since a batch that is
    bad is rare and weights that are bad stay so."""
    on_spike: Said[str] = "none"
    """What happens when a loss is far above those before it: none goes on, rollback takes the run back to the last
    checkpoint whose weights gave no such loss, and leaves out the samples since (arXiv:2204.02311, section 5.1)."""
    spike_deviations: Said[float] = 7.0
    """The number of standard deviations above the mean of the last losses from which a loss is a spike, 7 as in the
    spike score of OLMo 2 (arXiv:2501.00656)."""
    spike_window: Said[int] = 100
    """The number of last losses that a spike is judged by; as long as there are fewer, no loss is one."""
    max_rollbacks: Said[int] = 3
    """The number of times that a run goes back by on_spike=rollback, resumes included; at one more it stops."""

    def __post_init__(self) -> None:
        """Check what one section can know of itself."""
        for name in ("steps", "global_batch_size", "micro_batch_size", "log_every_steps", "eval_samples"):
            check_at_least("train", 1, **{name: getattr(self, name)})
        check_at_least("train", 0, eval_every_steps=self.eval_every_steps, seed=self.seed)
        check_at_most("train", MAX_BATCH_SIZE, global_batch_size=self.global_batch_size)
        check_at_least("train", 1, max_consecutive_skips=self.max_consecutive_skips)
        check_one_of("train", "precision", self.precision, PRECISIONS)
        check_one_of("train", "on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        check_one_of("train", "on_spike", self.on_spike, ON_SPIKE)
        check_at_least("train", 0, spike_deviations=self.spike_deviations)
        check_at_least("train", 2, spike_window=self.spike_window)
        check_at_least("train", 1, max_rollbacks=self.max_rollbacks)
        if not self.output_dir.strip():
            refuse("train.output_dir", repr(self.output_dir), "be the path of the run's folder")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, which are kept, and which one a run begins from."""

    every_steps: Free[int] = 1000
    """The number of steps between two checkpoints; one more is written at the end and on a signal. With 0 there is only
    that one."""
    keep: Free[int] = 3
    """The number of newest checkpoints that are kept; 0 keeps all."""
    asynchronous: Free[bool | None] = None
    """Whether checkpoints are written in the background, from a copy in host memory, while the training goes on; null:
    where a host's free memory is at least twice what the copies of its ranks take. The one at the end of a run and the
    one after a signal are waited for."""
    resume: Free[str] = "auto"
    """Where a run begins: auto takes the run's latest checkpoint, if there is one; none begins anew, and only in a
    folder without checkpoints; the path of another run's checkpoint begins from that, as long as this run has none of
    its own."""
    accept_other_data: Free[bool] = False
    """Whether a run resumes although data.train is not what the checkpoint was trained on, for data that was mended; a
    line of the log says so. The position in the data stays, and other samples may lie there."""

    def __post_init__(self) -> None:
        """Check what one section can know of itself."""
        check_at_least("checkpoint", 0, every_steps=self.every_steps, keep=self.keep)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """What the ranks do about trouble while they train."""

    hang_timeout_seconds: Free[float] = 1200.0
    """The seconds after which a rank that makes no progress says where it waits and which rank holds it up, and ends;
    0 never ends it. It is shorter than parallel.timeout_minutes, after which a collective would end with less said.
    Until the first step is done a rank has at least ten minutes."""
    slow_rank_ratio: Free[float] = 1.5
    """The ratio of a rank's own time of a step to the median of the ranks from which on the log names it, where it
    stays there for 30 steps; 0 names none."""

    def __post_init__(self) -> None:
        """Check what one section can know of itself."""
        if self.hang_timeout_seconds and not self.hang_timeout_seconds >= 1:
            requirement = "be at least 1, or 0 to end no rank"
            refuse("runtime.hang_timeout_seconds", self.hang_timeout_seconds, requirement)
        if self.slow_rank_ratio and not self.slow_rank_ratio > 1:
            refuse("runtime.slow_rank_ratio", self.slow_rank_ratio, "be above 1, or 0 to name no rank")
        check_at_most("runtime", MAX_HANG_TIMEOUT_SECONDS, hang_timeout_seconds=self.hang_timeout_seconds)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run: everything that its YAML file and the overrides of the command say."""

    model: ModelConfig
    """The network that is trained, its positions, its dropout and its initial weights."""
    data: DataConfig
    """The text that it is trained and validated on."""
    optimizer: OptimizerConfig
    """The optimizer and the schedule of its learning rate."""
    train: TrainConfig
    """The steps, their batches, and the run's folder."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks share one model."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """What DeepSpeed ZeRO cuts over the data-parallel ranks."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written, and where a run begins."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """What the ranks do about trouble while they train."""
