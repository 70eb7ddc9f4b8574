"""The record of a step and of a validation, which are the lines of metrics.jsonl, and the reader of a run's lines."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megalibi.errors import ConfigError

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
INFO_FILE = "run_info.json"

# JSON has no NaN and no infinity. As in protobuf's JSON they are strings, which float() reads back in any language.
_NON_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
_KINDS: dict[str, tuple[type, ...]] = {"float": (float, int), "int": (int,), "str": (str,), "bool": (bool,)}


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, as the writing rank saw it."""

    step: int
    """Optimizer steps done, this one included; the first step is 1."""
    tokens: int
    """Tokens consumed since the run began, this step included."""
    loss: float
    """Mean cross entropy over the tokens of the global batch, in nats per token."""
    grad_norm: float
    """Global L2 norm of the gradients before clipping."""
    learning_rate: float
    """Learning rate this step was taken with."""
    step_seconds: float
    """Wall time of the step."""
    tokens_per_second: float
    """Tokens of the global batch by step_seconds, all ranks together."""
    model_tflops_per_second: float
    """Model TFLOP by step_seconds, all ranks together, attention counted in full (queries x keys)."""
    model_tflops_per_second_causal: float
    """The same with the half of attention that the causal mask removes left out."""
    memory_bytes: int
    """Memory in use at the end of the step; see `memory_bytes`."""
    memory_peak_bytes: int
    """Highest memory in use so far; see `memory_peak_bytes`."""
    sample_hash: str
    """Hash of the sample ids of the global batch, 16 hex digits; the same on every topology."""
    loss_scale: float | None = None
    """Loss scale of the step, in fp16 only."""
    samples: int | None = None
    """Samples consumed since the run began: the position in the data."""
    skipped: bool | None = None
    """Whether the optimizer left the weights alone because the gradients overflowed, in fp16 only."""

    def to_json(self) -> str:
        """Return the record as one line of strict JSON without its newline; absent optional fields are left out."""
        return _to_json(self)


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """One pass over the validation set."""

    step: int
    """Optimizer steps done when it was measured."""
    tokens: int
    """Training tokens consumed when it was measured."""
    validation_loss: float
    """Mean cross entropy over the validation tokens, in nats per token."""
    validation_perplexity: float
    """exp(validation_loss)."""
    validation_tokens: int
    """Tokens the loss is the mean of."""
    validation_seconds: float
    """Wall time of the pass."""
    validation_samples: int | None = None
    """Samples that were read: train.eval_samples, or all that data.valid has; not recorded by early versions."""

    def to_json(self) -> str:
        """Return the record as one line of strict JSON without its newline; absent optional fields are left out."""
        return _to_json(self)


Record = TypeVar("Record", StepRecord, ValidationRecord)


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """What a run recorded: each step once and each validation once, in the order of steps."""

    steps: tuple[StepRecord, ...]
    validations: tuple[ValidationRecord, ...]


def parse_line(line: str) -> StepRecord | ValidationRecord:
    """Read one line of metrics.jsonl; fields that no record knows are ignored.

    Raises:
        ValueError: The line is no JSON object, lacks a field, or has one of another type.
    """
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    if "validation_loss" in fields:
        return _from_fields(ValidationRecord, fields)
    return _from_fields(StepRecord, fields)


def read_records_of_step(path: Path | str, step: int) -> Iterator[StepRecord | ValidationRecord]:
    """Yield the records of one step of a metrics.jsonl, in the order of its lines, as far as they can be read."""
    if not Path(path).exists():
        return
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if f'"step": {step},' in line:  # to parse a million lines takes many seconds
                with contextlib.suppress(ValueError):
                    yield parse_line(line)


def read_metrics(run_dir: Path | str) -> RunMetrics:
    """Read metrics.jsonl of a run, whatever a crash did to it.

    A torn last line is left out. Steps replayed after a crash stand twice in the file: the last record of a step wins.
    A run that has not recorded anything yet, or has no file yet, gives no steps.

    Args:
        run_dir: The run's folder (train.output_dir).

    Raises:
        ConfigError: A line other than the last cannot be read.
    """
    path = Path(run_dir) / METRICS_FILE
    steps: dict[int, StepRecord] = {}
    validations: dict[int, ValidationRecord] = {}
    # A torn line may end inside a character, or in the zeros of a block that was never written.
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_line(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ConfigError(f"{path} line {number}: not a record of a step ({error}); remove the line") from error
        if isinstance(record, StepRecord):
            steps[record.step] = record
        else:
            validations[record.step] = record
    return RunMetrics(
        steps=tuple(steps[step] for step in sorted(steps)),
        validations=tuple(validations[step] for step in sorted(validations)),
    )


def _to_json(record: StepRecord | ValidationRecord) -> str:
    fields = {name: value for name, value in dataclasses.asdict(record).items() if value is not None}
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            fields[name] = _NON_FINITE[str(value)]
    return json.dumps(fields, allow_nan=False)


def _from_fields(record_type: type[Record], fields: Mapping[str, Any]) -> Record:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(record_type):
        if field.name in fields:
            value = fields[field.name]
            # Annotations are strings here (PEP 563): "float" and "float | None" alike.
            kind, _, optional = str(field.type).partition(" | ")
            if kind == "float" and value in _NON_FINITE.values():
                value = float(value)
            # Whole numbers are floats too, and true and false are numbers only to Python.
            fits = type(value) in _KINDS[kind] or (value is None and bool(optional))
            if not fits:
                raise ValueError(f"field {field.name} is {value!r}, which is no {kind}")
            values[field.name] = float(value) if kind == "float" and value is not None else value
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"field {field.name} is missing")
    return record_type(**values)
