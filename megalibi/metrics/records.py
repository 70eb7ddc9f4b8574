"""The record of a step and of a validation, which are the lines of metrics.jsonl, and the reader of a run's lines."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megalibi.errors import CheckpointError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

METRICS_FILE = "metrics.jsonl"
"""File of a run's folder with a line for each step and each validation."""
CONFIG_FILE = "config.yaml"
"""File of a run's folder with the resolved configuration."""
INFO_FILE = "run_info.json"
"""File of a run's folder with its identity, its environment and its origin."""
DIVERGED_FILE = "diverged.json"
"""File of a run's folder with the step at which it has diverged, and why; the next start removes it."""

# JSON has no NaN and no infinity. As in protobuf's JSON they are strings, which float() reads back in any language.
_NON_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
_KINDS: dict[str, tuple[type, ...]] = {
    "float": (float, int),  # a whole number is a float too; True is an int to Python, but its type is another one
    "int": (int,),
    "str": (str,),
    "bool": (bool,),
    "dict": (dict,),
    "tuple": (tuple,),
}


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step: a line of metrics.jsonl, written by rank 0."""

    step: int
    """Optimizer steps done, including this one; the first step is 1."""
    tokens: int
    """Training tokens consumed since the run began, including this step."""
    loss: float
    """Mean cross entropy over the tokens of the global batch, in nats per token."""
    grad_norm: float
    """Global L2 norm of the gradients before clipping."""
    learning_rate: float
    """Learning rate of this step."""
    step_seconds: float
    """Wall time of the step, in seconds."""
    tokens_per_second: float
    """Tokens of the global batch divided by step_seconds, all ranks together."""
    model_tflops_per_second: float
    """Model TFLOP divided by step_seconds, all ranks together; attention counts every query-key pair."""
    model_tflops_per_second_causal: float
    """Model TFLOP divided by step_seconds, all ranks together; attention counts the pairs in the causal mask."""
    memory_bytes: int
    """Memory that rank 0 uses at the end of the step, in bytes, as `metrics.memory.memory_bytes` gives it."""
    memory_peak_bytes: int
    """Highest memory that rank 0 has used so far, in bytes, as `metrics.memory.memory_peak_bytes` gives it."""
    sample_hash: str
    """Hash of the sample ids of the global batch, 16 hexadecimal digits; it is the same on every topology."""
    loss_scale: float | None = None
    """Loss scale of the step; only in fp16."""
    samples: int | None = None
    """Samples consumed since the run began, which is the position in the data; early versions did not record it."""
    skipped: bool | None = None
    """Whether the step left the weights as they were, since a number was not finite; outside of fp16 only where so."""
    straggler_ratio: float | None = None
    """Own time a step of the slowest rank divided by the median of the ranks; where the ranks compared it."""
    slowest_rank: int | None = None
    """The rank that the straggler ratio is about, whether it is slow or not."""

    def to_json(self) -> str:
        """Return the record as one line of strict JSON without its newline; fields that are None are left out."""
        return _to_json(self)


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """One pass over the validation data: a line of metrics.jsonl, written by rank 0."""

    step: int
    """Optimizer steps done before the pass."""
    tokens: int
    """Training tokens consumed before the pass."""
    validation_loss: float
    """Mean cross entropy over the validation tokens, in nats per token."""
    validation_perplexity: float
    """The perplexity per token, exp(validation_loss)."""
    validation_tokens: int
    """Number of tokens that validation_loss is the mean of."""
    validation_seconds: float
    """Wall time of the pass, in seconds."""
    validation_samples: int | None = None
    """Number of samples read: train.eval_samples, or all of data.valid; early versions did not record it."""

    def to_json(self) -> str:
        """Return the record as one line of strict JSON without its newline; fields that are None are left out."""
        return _to_json(self)


@dataclass(frozen=True, kw_only=True)
class RollbackRecord:
    """A loss spike that took the run back to a checkpoint: a line of metrics.jsonl, and an entry of the manifests."""

    step: int
    """Optimizer steps done where the run went on: those of the checkpoint."""
    rolled_back_from: int
    """The step whose loss was the spike: it and the steps before it, down to `step`, were taken back."""
    spike_loss: float
    """Mean cross entropy of that step, in nats per token."""
    left_out: str
    """Numbers of the samples of these steps, which are left out from then on, as data.skip has them."""

    def to_json(self) -> str:
        """Return the record as one line of strict JSON without its newline."""
        return _to_json(self)


_Record = TypeVar("_Record", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """The records of a run: each step once and each validation once, in the order of steps."""

    steps: tuple[StepRecord, ...]
    """The recorded steps, in their order."""
    validations: tuple[ValidationRecord, ...]
    """The recorded validations, in the order of their steps."""
    rollbacks: tuple[RollbackRecord, ...] = ()
    """The loss spikes that took the run back, in the order in which they came."""


def parse_line(line: str) -> StepRecord | ValidationRecord | RollbackRecord:
    """Read one line of metrics.jsonl; unknown fields are ignored.

    Raises:
        ValueError: The line is no JSON object, lacks a field, or has one of another type.
    """
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    if "validation_loss" in fields:
        return record_from_fields(ValidationRecord, fields)
    if "rolled_back_from" in fields:
        return record_from_fields(RollbackRecord, fields)
    return record_from_fields(StepRecord, fields)


def read_records_of_step(path: Path | str, step: int) -> Iterator[StepRecord | ValidationRecord | RollbackRecord]:
    """Yield the records of one step of a metrics.jsonl in the order of its lines; unreadable lines are passed over."""
    if not Path(path).exists():
        return
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if f'"step": {step},' in line:  # because parsing a million lines takes many seconds
                with contextlib.suppress(ValueError):
                    yield parse_line(line)


def read_last_losses(run_dir: Path | str, count: int) -> list[tuple[int, float]]:
    """Return the last steps of a metrics.jsonl with their losses, ``count`` of them or fewer.

    Args:
        run_dir: The run's folder (train.output_dir).
        count: How many.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = deque(file, maxlen=4 * count)  # for validations and the like stand between them
    steps = []
    for line in lines:
        with contextlib.suppress(ValueError):
            record = parse_line(line)
            if isinstance(record, StepRecord):
                steps.append((record.step, record.loss))
    return steps[-count:]


def read_metrics(run_dir: Path | str) -> RunMetrics:
    """Read the metrics.jsonl of a run, whatever a crash did to it.

    A torn last line is left out. If a step was replayed after a crash and stands in the file twice, its last record
    counts. A run that has not recorded anything yet, or has no file yet, has no steps.

    Args:
        run_dir: The run's folder (train.output_dir).

    Raises:
        CheckpointError: A line other than the last cannot be read.
    """
    path = Path(run_dir) / METRICS_FILE
    steps: dict[int, StepRecord] = {}
    validations: dict[int, ValidationRecord] = {}
    rollbacks: list[RollbackRecord] = []
    # A torn line may end inside a character, or in the zeros of a block that was never written.
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_line(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise CheckpointError(f"{path} line {number}: not a record of a step ({error}); remove the line") from error
        if isinstance(record, StepRecord):
            steps[record.step] = record
        elif isinstance(record, RollbackRecord):
            rollbacks.append(record)
        else:
            validations[record.step] = record
    return RunMetrics(
        steps=tuple(steps[step] for step in sorted(steps)),
        validations=tuple(validations[step] for step in sorted(validations)),
        rollbacks=tuple(rollbacks),
    )


def _to_json(record: StepRecord | ValidationRecord | RollbackRecord) -> str:
    fields = {name: value for name, value in dataclasses.asdict(record).items() if value is not None}
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            fields[name] = _NON_FINITE[str(value)]
    return json.dumps(fields, allow_nan=False)


def record_from_fields(record_type: type[_Record], fields: Mapping[str, Any]) -> _Record:
    """Build a record from the fields of a JSON object; unknown fields are ignored.

    Args:
        record_type: A dataclass whose fields are numbers, texts, booleans, dictionaries or tuples.
        fields: The values by name. Those with a default may be missing.

    Raises:
        ValueError: A field is missing or has a value of another type.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(record_type):
        if field.name in fields:
            value = fields[field.name]
            # Annotations are strings here (PEP 563): "float", "float | None" and "dict[str, str]".
            kind, _, optional = str(field.type).partition(" | ")
            kind = kind.partition("[")[0]
            if kind == "float" and value in _NON_FINITE.values():
                value = float(value)
            fits = type(value) in _KINDS[kind] or (value is None and bool(optional))
            if not fits:
                raise ValueError(f"{field.name}={value!r}: must be of type {field.type}")
            values[field.name] = float(value) if kind == "float" and value is not None else value
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"the field {field.name} is missing")
    return record_type(**values)
