"""An evaluation file: what it holds, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megalibi.errors import ConfigError
from megalibi.files import read_json_object

EVALUATION_PATTERN = "evaluation*.json"


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


def read_evaluation(path: Path | str) -> Evaluation:
    """Read an evaluation file; fields that the report does not use are ignored.

    Raises:
        ConfigError: The file is no evaluation.
    """
    path = Path(path)
    fields = read_json_object(path)
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
