from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megalibi.errors import CheckpointError
from megalibi.metrics.records import (
    StepRecord,
    ValidationRecord,
    parse_line,
    read_metrics,
)

MakeStep = Callable[..., StepRecord]
MakeValidation = Callable[..., ValidationRecord]

# The least that a line promises; scripts rely on these names.
PROMISED_FIELDS = {
    "step",
    "tokens",
    "loss",
    "grad_norm",
    "learning_rate",
    "step_seconds",
    "tokens_per_second",
    "model_tflops_per_second",
    "memory_bytes",
    "sample_hash",
}


def write_lines(run_dir: Path, *lines: str, end: str = "\n") -> None:
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + end)


def test_a_line_has_the_promised_fields_and_no_empty_ones(make_step: MakeStep) -> None:
    fields = json.loads(make_step(3).to_json())
    assert set(fields) >= PROMISED_FIELDS
    assert None not in fields.values()
    assert "loss_scale" not in fields
    assert json.loads(make_step(3, loss_scale=1024.0, skipped=False).to_json())["skipped"] is False


def test_records_come_back_bit_for_bit(make_step: MakeStep, make_validation: MakeValidation) -> None:
    third = 1.0 / 3.0
    for record in (make_step(1, loss=third, samples=8), make_validation(2, math.nextafter(third, 1))):
        assert parse_line(record.to_json()) == record


def test_what_is_not_finite_is_strict_json_and_comes_back(make_step: MakeStep) -> None:
    line = make_step(1, loss=math.nan, grad_norm=math.inf, learning_rate=-math.inf).to_json()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads(line, parse_constant=refuse)
    record = parse_line(line)
    assert isinstance(record, StepRecord)
    assert math.isnan(record.loss)
    assert (record.grad_norm, record.learning_rate) == (math.inf, -math.inf)


def test_reading_separates_steps_from_validations(
    tmp_path: Path, make_step: MakeStep, make_validation: MakeValidation
) -> None:
    write_lines(tmp_path, make_step(1).to_json(), make_step(2).to_json(), make_validation(2).to_json())
    metrics = read_metrics(tmp_path)
    assert metrics.steps == (make_step(1), make_step(2))
    assert metrics.validations == (make_validation(2),)


def test_a_validation_says_its_samples_and_one_of_an_early_version_does_not(
    tmp_path: Path, make_validation: MakeValidation
) -> None:
    early, record = make_validation(2), dataclasses.replace(make_validation(4), validation_samples=3)
    assert "validation_samples" not in early.to_json()
    assert json.loads(record.to_json())["validation_samples"] == 3
    write_lines(tmp_path, early.to_json(), record.to_json())
    assert read_metrics(tmp_path).validations == (early, record)


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_torn_last_line_is_left_out(tmp_path: Path, make_step: MakeStep, kept: int) -> None:
    write_lines(tmp_path, make_step(1).to_json(), make_step(2).to_json()[:kept], end="")
    assert read_metrics(tmp_path).steps == (make_step(1),)


def test_zeros_after_a_power_failure_are_left_out(tmp_path: Path, make_step: MakeStep) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(make_step(1).to_json().encode() + b"\n" + bytes(40) + b"\xc3")
    assert read_metrics(tmp_path).steps == (make_step(1),)


def test_the_last_record_of_a_replayed_step_wins(
    tmp_path: Path, make_step: MakeStep, make_validation: MakeValidation
) -> None:
    lines = [make_step(1), make_step(2, loss=9.0), make_validation(2, 9.0), make_step(3, loss=9.0), make_step(2)]
    write_lines(tmp_path, *(record.to_json() for record in [*lines, make_validation(2, 3.0)]))
    metrics = read_metrics(tmp_path)
    assert [record.loss for record in metrics.steps] == [make_step(1).loss, make_step(2).loss, 9.0]
    assert [record.validation_loss for record in metrics.validations] == [3.0]


def test_fields_of_later_versions_are_ignored(tmp_path: Path, make_step: MakeStep) -> None:
    write_lines(tmp_path, json.dumps(json.loads(make_step(1).to_json()) | {"temperature_celsius": 41}))
    assert read_metrics(tmp_path).steps == (make_step(1),)


@pytest.mark.parametrize("damage", ["{", "[]", '{"step": 2}', ""])
def test_damage_before_the_last_line_is_named(tmp_path: Path, make_step: MakeStep, damage: str) -> None:
    write_lines(tmp_path, make_step(1).to_json(), damage, make_step(3).to_json())
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl line 2: not a record"):
        read_metrics(tmp_path)


def test_a_run_that_has_not_begun_has_no_steps(tmp_path: Path) -> None:
    assert read_metrics(tmp_path).steps == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", '"7"'),
        ("step", "null"),
        ("step", "1.5"),
        ("loss", '"x"'),
        ("loss", "null"),
        ("step", "true"),
        ("sample_hash", "7"),
    ],
)
def test_a_field_of_another_type_is_said_with_its_line(
    tmp_path: Path, make_step: Callable[..., StepRecord], field: str, value: str
) -> None:
    good = make_step(2).to_json()
    (tmp_path / "metrics.jsonl").write_text(re.sub(f'"{field}": [^,}}]+', f'"{field}": {value}', good) + f"\n{good}\n")
    with pytest.raises(CheckpointError, match=f"metrics.jsonl line 1: not a record of a step .{field}=.*: must be "):
        read_metrics(tmp_path)
