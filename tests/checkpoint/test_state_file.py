from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from megalibi.checkpoint.tensors.state_file import StateFileWriter, Stretch, list_stretches
from megalibi.errors import CheckpointError

STRETCHES = [Stretch("weight", "a", 3, 5), Stretch("exp_avg", "a", 0, 0), Stretch("weight", "b.c", 0, 7)]
VALUES = [torch.arange(5.0), torch.empty(0), torch.randn(7, dtype=torch.float64)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    writer = StateFileWriter(tmp_path / "a.safetensors", 2, STRETCHES)
    for values in VALUES:
        writer.write(values)
    assert writer.close().size_bytes == (tmp_path / "a.safetensors").stat().st_size
    return tmp_path / "a.safetensors"


def test_what_was_written_is_read_in_part_and_by_the_library(path: Path) -> None:
    rank, found = list_stretches(path)
    assert rank == 2
    assert [(kind, name, stretch.start, stretch.length) for (kind, name), stretch in found.items()] == STRETCHES
    assert found["weight", "a"].read(4, 7).tolist() == [1.0, 2.0, 3.0]
    assert found["exp_avg", "a"].read(0, 0).tolist() == []
    assert torch.equal(found["weight", "b.c"].read(0, 7), VALUES[2].float())
    theirs = safetensors.torch.load_file(path)
    assert sorted(theirs) == ["exp_avg/a", "weight/a", "weight/b.c"]
    assert torch.equal(theirs["weight/b.c"], VALUES[2].float())


def test_fewer_values_than_the_header_says_are_our_mistake(tmp_path: Path) -> None:
    writer = StateFileWriter(tmp_path / "a.safetensors", 0, STRETCHES)
    writer.write(VALUES[0])
    with pytest.raises(AssertionError):
        writer.close()


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another type": lambda header: header["weight/a"].update(dtype="I32"),
    "an overlap": lambda header: header["weight/b.c"].update(data_offsets=[16, 44]),
    "another size": lambda header: header["weight/b.c"].update(shape=[8]),
    "two dimensions": lambda header: header["weight/b.c"].update(shape=[7, 1]),
    "a number that is none": lambda header: header["weight/a"].update(shape=[5.0]),
    "a tensor less": lambda header: header.pop("weight/b.c"),
    "no metadata": lambda header: header.pop("__metadata__"),
    "no starts": lambda header: header["__metadata__"].pop("starts"),
    "a start below zero": lambda header: header["__metadata__"].update(
        starts='{"weight/a": -1, "exp_avg/a": 0, "weight/b.c": 0}'
    ),
    "no dictionary": lambda header: header.update({"weight/a": 3}),
    "a rank that is none": lambda header: header["__metadata__"].update(tensor_rank="two"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_header_is_one_line(path: Path, what: str) -> None:
    forge(path, FORGERIES[what])
    with pytest.raises(CheckpointError, match="cannot be loaded: its header is not that of megalibi: ") as refusal:
        list_stretches(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"text", b"\xff" * 100, (90).to_bytes(8, "little") + b"[" * 90])
def test_what_is_no_such_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"/a cannot be loaded: ") as refusal:
        list_stretches(tmp_path / "a")
    assert "\n" not in str(refusal.value)


def test_a_file_that_has_become_shorter_is_named(path: Path) -> None:
    _, found = list_stretches(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ends too early"):
        found["weight", "b.c"].read(0, 7)
