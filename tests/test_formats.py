"""docs/formats.md names every field of the files that it describes, and no others."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from megalibi.checkpoint.manifest import Manifest
from megalibi.data.provenance import Provenance
from megalibi.data.tokens.identity import DataIdentity, Identity
from megalibi.evaluate.result import Evaluation, EvaluationResult
from megalibi.metrics.records import StepRecord, ValidationRecord

FORMATS = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")


def read_section(title: str) -> str:
    """Return the text below a title, up to the next one."""
    (section,) = re.findall(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", FORMATS, re.MULTILINE | re.DOTALL)
    return str(section)


def read_fields(title: str) -> list[str]:
    """Return the names in the first column of a section's table."""
    rows = re.findall(r"^\| (`[^|]+) \|", read_section(title), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def names_of(record: type) -> list[str]:
    return [field.name for field in dataclasses.fields(record)]


@pytest.mark.parametrize(
    ("title", "record", "besides"),
    [
        ("Step", StepRecord, set()),
        ("Validation", ValidationRecord, set()),
        ("evaluation.json", Evaluation, {"name"}),  # of the file, and not in it
        ("Result", EvaluationResult, set()),
    ],
)
def test_each_field_of_a_record_has_a_row_and_each_row_is_a_field(title: str, record: type, besides: set[str]) -> None:
    assert read_fields(title) == [name for name in names_of(record) if name not in besides]


@pytest.mark.parametrize(("title", "record"), [("manifest.json", Manifest), ("PREFIX.json", Provenance)])
def test_each_field_of_other_files_has_a_row(title: str, record: type) -> None:
    assert set(names_of(record)) <= set(read_fields(title))


def test_what_identifies_data_is_named() -> None:
    for title, record in (("manifest.json", DataIdentity), ("manifest.json", Identity), ("PREFIX.json", Identity)):
        text = read_section(title)
        assert [name for name in names_of(record) if f"`{name}`" not in text] == []
