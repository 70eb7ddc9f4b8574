"""docs/formats.md names every field of the files that it describes, and no others."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from megalibi.checkpoint.manifest import Manifest
from megalibi.checkpoint.parameters import ParameterEntry
from megalibi.data.provenance import Provenance
from megalibi.data.tokens.identity import DataIdentity, Identity
from megalibi.engine.masters import OptimizerProgress
from megalibi.evaluate.result import Evaluation, EvaluationResult
from megalibi.export.certificate import Certificate, LogitComparison, SlopeTables, TensorRecord
from megalibi.metrics.records import RollbackRecord, StepRecord, ValidationRecord
from megalibi.model import DTYPES
from megalibi.parallel import ShardSpec, shard

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
        ("Rollback", RollbackRecord, set()),
        ("evaluation.json", Evaluation, {"name"}),  # of the file, and not in it
        ("Result", EvaluationResult, set()),
        ("Parameter", ParameterEntry, set()),
        ("Shard", ShardSpec, set()),
        ("certificate.json", Certificate, set()),
        ("Tensor of a certificate", TensorRecord, set()),
        ("Slopes of a certificate", SlopeTables, set()),
        ("Comparison of a certificate", LogitComparison, set()),
    ],
)
def test_each_field_of_a_record_has_a_row_and_each_row_is_a_field(title: str, record: type, besides: set[str]) -> None:
    assert read_fields(title) == [name for name in names_of(record) if name not in besides]


@pytest.mark.parametrize(("title", "record"), [("manifest.json", Manifest), ("PREFIX.json", Provenance)])
def test_each_field_of_other_files_has_a_row(title: str, record: type) -> None:
    assert set(names_of(record)) <= set(read_fields(title))


def test_what_the_optimizer_has_done_is_named() -> None:
    assert read_fields("Optimizer") == ["kind", *names_of(OptimizerProgress)]


def test_what_identifies_data_is_named() -> None:
    for title, record in (("manifest.json", DataIdentity), ("manifest.json", Identity), ("PREFIX.json", Identity)):
        text = read_section(title)
        assert [name for name in names_of(record) if f"`{name}`" not in text] == []


def test_the_precisions_of_a_parameter_are_named() -> None:
    for dtype in DTYPES.values():
        assert f"`{str(dtype).removeprefix('torch.')}`" in read_section("Parameter")


@pytest.mark.parametrize(
    ("spec", "num_ranks"),
    [
        (ShardSpec(dim=0, full_size=12), 1),
        (ShardSpec(dim=1, full_size=12), 4),
        (ShardSpec(dim=0, full_size=12, parts=3), 2),
        (ShardSpec(dim=1, full_size=10, padding=2), 4),
        (ShardSpec(dim=0, full_size=5, padding=7), 4),
    ],
)
def test_a_tensor_is_put_together_as_the_document_says(spec: ShardSpec, num_ranks: int) -> None:
    """In its own words: part by part and in each the slices of the ranks, and what comes after full_size is cut off."""
    shape = [2, 2, 3]
    shape[spec.dim] = spec.full_size
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    of_ranks = [shard(whole, spec, rank, num_ranks) for rank in range(num_ranks)]
    n = (spec.full_size + spec.padding) // (spec.parts * num_ranks)
    assert {of_rank.shape[spec.dim] for of_rank in of_ranks} == {spec.parts * n}
    slices = [of_rank.narrow(spec.dim, part * n, n) for part in range(spec.parts) for of_rank in of_ranks]
    padded = torch.cat(slices, spec.dim)
    assert torch.equal(padded.narrow(spec.dim, 0, spec.full_size), whole)
    assert not padded.narrow(spec.dim, spec.full_size, spec.padding).any()
