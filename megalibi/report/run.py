"""A run's folder as the report reads it: configuration, metrics, evaluations, and the numbers that sum them up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalibi.config import ConfigError
from megalibi.config.yaml_text import SavedLoader, parse_yaml, read_yaml
from megalibi.metrics.records import METRICS_FILE, RunMetrics, StepRecord, ValidationRecord, read_metrics

CONFIG_FILE = "config.yaml"
INFO_FILE = "run_info.json"
EVALUATION_PATTERN = "evaluation*.json"

# The final training loss is a mean, over the last twentieth of the run but 100 steps at most: one batch is too noisy.
_FINAL_FRACTION = 20
_FINAL_STEPS_MAX = 100


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What one evaluation length gave."""

    length: int
    """Tokens the model saw at once."""
    loss: float
    """Mean cross entropy in nats per token."""
    perplexity: float
    """exp(loss)."""
    tokens: int
    """Tokens the loss is the mean of."""
    bits_per_byte: float | None = None
    """Loss in bits by bytes of text, comparable between tokenizers."""
    tokens_per_second: float | None = None
    """Speed of the evaluation."""
    memory_bytes: int | None = None
    """Memory the evaluation took."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation file: one checkpoint at several lengths."""

    name: str
    """The file's name without its ending."""
    step: int
    """Step of the checkpoint."""
    train_seq_length: int
    """Length the model was trained at."""
    protocol: str
    """How the text was cut: nonoverlapping or sliding."""
    stride: int | None = None
    """Tokens between windows, if they slide."""
    command: str = ""
    """The command that made the file."""
    results: tuple[EvaluationResult, ...]
    """By rising length."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a report says about one run."""

    name: str
    """The folder's name."""
    config: dict[str, Any]
    """config.yaml as nested plain values; empty if there is none."""
    info: dict[str, Any]
    """run_info.json: parameter count, environment; empty if there is none."""
    metrics: RunMetrics
    """The recorded steps and validations."""
    evaluations: tuple[Evaluation, ...]
    """The evaluation files of the folder, by name."""


@dataclass(frozen=True, kw_only=True)
class Quartiles:
    """The median of a measurement and its interquartile range."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Return the quartiles of at least one value."""
        low, median, high = np.percentile(values, (25, 50, 75))
        return cls(low=float(low), median=float(median), high=float(high))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The numbers one quotes of a run."""

    steps: int
    """Last step."""
    tokens: int
    """Training tokens consumed."""
    loss: float
    """Mean training loss of the last `loss_steps` steps."""
    loss_steps: int
    """How many steps that mean is of."""
    validation: ValidationRecord | None
    """The last validation, if there was any."""
    tokens_per_second: Quartiles
    """Over all recorded steps."""
    model_tflops_per_second: Quartiles
    """Over all recorded steps, attention counted in full."""
    model_tflops_per_second_causal: Quartiles
    """Over all recorded steps, attention counted causally."""
    memory_peak_bytes: int
    """Highest over the run."""
    train_seconds: float
    """Sum of the steps' wall times; validation and saving are not in it."""
    skipped_steps: int
    """Steps whose gradients overflowed in fp16."""


def read_run(run_dir: Path | str) -> Run:
    """Read a run's folder.

    Args:
        run_dir: The run's folder (train.output_dir).

    Raises:
        ConfigError: The folder is missing or no run's, or a file in it cannot be read.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise ConfigError(f"run {folder}: no such folder; give a run's folder (its train.output_dir)")
    if not (folder / CONFIG_FILE).exists() and not (folder / METRICS_FILE).exists():
        raise ConfigError(
            f"run {folder}: holds neither {CONFIG_FILE} nor {METRICS_FILE}; give a run's folder (its train.output_dir)"
        )
    return Run(
        name=folder.resolve().name,
        config=_read_config(folder / CONFIG_FILE),
        info=_read_json(folder / INFO_FILE) if (folder / INFO_FILE).exists() else {},
        metrics=read_metrics(folder),
        evaluations=tuple(read_evaluation(path) for path in sorted(folder.glob(EVALUATION_PATTERN))),
    )


def read_evaluation(path: Path | str) -> Evaluation:
    """Read an evaluation file; fields that the report does not use are ignored.

    Raises:
        ConfigError: The file is no evaluation.
    """
    path = Path(path)
    fields = _read_json(path)
    try:
        results = [
            EvaluationResult(**{name: row[name] for name in EvaluationResult.__dataclass_fields__ if name in row})
            for row in fields["results"]
        ]
        return Evaluation(
            name=path.stem,
            step=fields["step"],
            train_seq_length=fields["train_seq_length"],
            protocol=fields["protocol"],
            stride=fields.get("stride"),
            command=fields.get("command", ""),
            results=tuple(sorted(results, key=lambda result: result.length)),
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not an evaluation file ({error}); write it with tools/evaluate.py") from error


def summarize(metrics: RunMetrics) -> Summary | None:
    """Sum a run's metrics up; None if no step is recorded."""
    steps = metrics.steps
    if not steps:
        return None
    final: Sequence[StepRecord] = steps[-max(1, min(len(steps) // _FINAL_FRACTION, _FINAL_STEPS_MAX)) :]
    return Summary(
        steps=steps[-1].step,
        tokens=steps[-1].tokens,
        loss=sum(record.loss for record in final) / len(final),
        loss_steps=len(final),
        validation=metrics.validations[-1] if metrics.validations else None,
        tokens_per_second=Quartiles.of([record.tokens_per_second for record in steps]),
        model_tflops_per_second=Quartiles.of([record.model_tflops_per_second for record in steps]),
        model_tflops_per_second_causal=Quartiles.of([record.model_tflops_per_second_causal for record in steps]),
        memory_peak_bytes=max(record.memory_peak_bytes for record in steps),
        train_seconds=sum(record.step_seconds for record in steps),
        skipped_steps=sum(bool(record.skipped) for record in steps),
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    # As save_config wrote it: the spelling of a text is no number's there.
    tree = parse_yaml(read_yaml(path), SavedLoader, f"{path} is not a valid configuration")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} is not a configuration: a mapping of sections is expected")
    return {str(section): fields for section, fields in tree.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: a JSON object is expected")
    return fields
