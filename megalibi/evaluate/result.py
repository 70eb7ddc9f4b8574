"""evaluation.json: what the evaluation of a checkpoint gave, as it is written and as it is read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalibi.errors import CheckpointError
from megalibi.files import read_json_object, write_json
from megalibi.metrics.records import record_from_fields

EVALUATION_PATTERN = "evaluation*.json"
"""The names under which a report finds evaluations in a run's folder."""
_LEFT_OUT_IF_ABSENT = ("slope_scale", "by_position", "question", "model")


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The losses at one evaluation length."""

    length: int
    """Tokens the model saw at once."""
    loss: float
    """Mean cross entropy, in nats per token."""
    perplexity: float
    """The perplexity per token, exp(loss)."""
    bits_per_byte: float | None = None
    """Loss in bits per byte of text, which compares models with different tokenizers; null if no tokenizer is known."""
    tokens: int
    """Number of tokens that were scored; the loss is their mean."""
    tokens_per_second: float | None = None
    """Scored tokens per second of wall time, of all ranks together."""
    memory_bytes: int | None = None
    """Highest memory in use on any rank, in bytes; on a GPU since this length began, else since the process began."""
    slope_scale: float | None = None
    """What the slopes of ALiBi were multiplied by; only with the option --slope-scale, and without it they were not."""
    by_position: dict[str, list[float]] | None = None
    """Mean loss by the tokens seen, as `by_position.to_columns` gives it; only with the option --by-position."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as the file has them."""
        return _to_dict(self)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One checkpoint on one text at several lengths: the content of evaluation.json.

    Files of earlier versions lack some of the fields that have a default here.
    """

    checkpoint: str = ""
    """The folder of the evaluated checkpoint."""
    step: int
    """Optimizer steps that the checkpoint was trained for."""
    train_seq_length: int
    """Length of the training samples, in tokens."""
    protocol: str
    """How the text was cut into windows: nonoverlapping or sliding."""
    stride: int | None = None
    """Tokens between sliding windows; null for windows that do not overlap."""
    data: str = ""
    """Prefix of the token file that was scored."""
    results: tuple[EvaluationResult, ...]
    """One result for each length, in rising order."""
    device: str = ""
    """Name of the GPU or of the processor that computed."""
    ranks: int | None = None
    """Number of ranks that shared the work."""
    tensor_parallel_size: int | None = None
    """Number of ranks that shared one model."""
    command: str = ""
    """Command that made the file."""
    commit: str = ""
    """Commit of megalibi, as in run_info.json."""
    date: str = ""
    """When the file was made, in UTC (ISO 8601)."""
    hardware: dict[str, Any] = field(default_factory=dict)
    """Processor, cores, threads, memory in bytes, and the GPU if there is one."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of megalibi, Python and the packages that matter."""
    question: dict[str, Any] | None = None
    """What a study asked for besides the lengths; it tells whether the file answers the same question again."""
    model: str | None = None
    """Checksum of the checkpoint's manifest; a study tells by it whether the file is about the same model."""
    name: str = field(default="", compare=False)
    """Name of the file without its ending. It is not in the file."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as the file has them."""
        fields = {**_to_dict(self), "results": [result.to_dict() for result in self.results]}
        del fields["name"]
        return fields


def read_evaluation(path: Path | str) -> Evaluation:
    """Read an evaluation file; fields that `Evaluation` does not have are ignored.

    Args:
        path: The file.

    Raises:
        CheckpointError: The file is not that of an evaluation.
        FileError: The file cannot be read, or is not a JSON object.
    """
    path = Path(path)
    fields = read_json_object(path)
    try:
        results = [record_from_fields(EvaluationResult, row) for row in fields["results"]]
        in_order = tuple(sorted(results, key=lambda result: result.length))
        return record_from_fields(Evaluation, {**fields, "results": in_order, "name": path.stem})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not an evaluation file ({error}); write it with megalibi evaluate") from error


def write_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write an evaluation file aside and rename it.

    Args:
        evaluation: The content.
        path: The file; its folder must exist.

    Raises:
        FileError: The file cannot be written.
    """
    write_json(evaluation.to_dict(), path)


def _to_dict(record: EvaluationResult | Evaluation) -> dict[str, Any]:
    fields = {entry.name: getattr(record, entry.name) for entry in dataclasses.fields(record)}
    return {name: value for name, value in fields.items() if value is not None or name not in _LEFT_OUT_IF_ABSENT}
