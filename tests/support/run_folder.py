"""A run's folder as training and evaluation leave it, small."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalibi.metrics.jsonl import JsonlWriter
from megalibi.metrics.records import StepRecord, ValidationRecord

RunWriter = Callable[..., Path]


@pytest.fixture
def make_step() -> Callable[..., StepRecord]:
    """Make the record of a step; what is not given follows from the step."""

    def make(step: int, **changes: Any) -> StepRecord:
        fields: dict[str, Any] = {
            "step": step,
            "tokens": 512 * step,
            "loss": 3.0 + 4.0 / step,
            "grad_norm": 0.8,
            "learning_rate": 3e-4,
            "step_seconds": 0.5,
            "tokens_per_second": 1024.0,
            "model_tflops_per_second": 0.21,
            "model_tflops_per_second_causal": 0.19,
            "memory_bytes": 1_200_000_000,
            "memory_peak_bytes": 1_300_000_000,
            "sample_hash": f"{step:016x}",
        }
        return StepRecord(**(fields | changes))

    return make


@pytest.fixture
def make_validation() -> Callable[..., ValidationRecord]:
    """Make the record of a validation."""

    def make(step: int, loss: float = 3.5) -> ValidationRecord:
        return ValidationRecord(
            step=step,
            tokens=512 * step,
            validation_loss=loss,
            validation_perplexity=math.exp(loss),
            validation_tokens=4096,
            validation_seconds=1.5,
        )

    return make


@pytest.fixture
def write_run(
    tmp_path: Path, make_step: Callable[..., StepRecord], make_validation: Callable[..., ValidationRecord]
) -> RunWriter:
    """Write a run's folder with 40 steps; what stands in it can be chosen."""

    def write(name: str, *, steps: int = 40, validation: bool = True, evaluation: bool = True) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = {
            "model": {"num_layers": 3, "hidden_size": 96, "num_attention_heads": 12, "position_method": "alibi"},
            "data": {"train": [{"prefix": "data/train", "weight": 1.0}], "seq_length": 64},
            "parallel": {"tensor_parallel_size": 2},
            "zero": {"stage": 1},
            "train": {"steps": 40, "precision": "bf16", "seed": 7},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        writer = JsonlWriter(folder / "metrics.jsonl")
        for step in range(1, steps + 1):
            writer.step(make_step(step))
            if validation and step % 20 == 0:
                writer.validation(make_validation(step))
        writer.close()
        if evaluation:
            (folder / "evaluation.json").write_text(json.dumps(make_evaluation()))
        return folder

    return write


def make_evaluation() -> dict[str, Any]:
    """An evaluation file's content, at once and twice the training length."""
    return {
        "checkpoint": "runs/x/checkpoints/step_00000040",
        "step": 40,
        "train_seq_length": 64,
        "protocol": "nonoverlapping",
        "stride": None,
        "results": [
            {"length": 128, "loss": 3.4, "perplexity": 29.96, "bits_per_byte": None, "tokens": 4096,
             "tokens_per_second": 900.0, "memory_bytes": 700_000_000},
            {"length": 64, "loss": 3.5, "perplexity": 33.12, "bits_per_byte": None, "tokens": 4096,
             "tokens_per_second": 1000.0, "memory_bytes": 600_000_000},
        ],
        "command": "python tools/evaluate.py --lengths 64,128",
        "versions": {"torch": "2.13.0"},
    }  # fmt: skip
