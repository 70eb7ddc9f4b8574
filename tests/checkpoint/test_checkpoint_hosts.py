"""Verifying a checkpoint on several hosts, each of which may have a copy of its own."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from megalibi.checkpoint import Checkpoint
from megalibi.errors import CheckpointError
from tests.support.checkpoints import counting_hashed_bytes, save_files
from tests.support.ranks import run_on_ranks
from tests.support.tensors import process_groups

RANKS = 2


def verify_as(folders: list[str], hosts: list[str]) -> tuple[int, str | None]:
    """Verify the folder of this rank on the host of this rank; return the bytes hashed, and the refusal."""
    world = process_groups(1).world
    checkpoint = Checkpoint.open(Path(folders[world.rank]))
    with counting_hashed_bytes() as counted:
        try:
            checkpoint.verify(world, host=hosts[world.rank])
        except CheckpointError as error:
            return counted[0], str(error)
    return counted[0], None


def copy_of(checkpoint: Path, host: str) -> Path:
    """Return what a host has of a checkpoint on a disk of its own."""
    copy = checkpoint.parent / host / checkpoint.name
    shutil.copytree(checkpoint, copy)
    return copy


def test_each_host_reads_every_file_of_its_copy_once(tmp_path: Path) -> None:
    checkpoint = save_files(tmp_path, 5)
    hosts = ["left", "right", "left"]
    copies = {host: str(copy_of(checkpoint, host)) for host in ("left", "right")}
    counted = run_on_ranks(3, verify_as, [copies[host] for host in hosts], hosts)
    assert [refusal for _, refusal in counted] == [None] * 3
    manifest_bytes = (checkpoint / "manifest.json").stat().st_size
    sizes = [path.stat().st_size for path in sorted(checkpoint.glob("*.pt"))]
    assert [hashed - manifest_bytes for hashed, _ in counted] == [sizes[0], sum(sizes), sizes[1]]


@pytest.mark.parametrize("host", ["left", "right"])
@pytest.mark.parametrize("name", ["a.pt", "b.pt"])
def test_a_flipped_byte_in_the_copy_of_any_host_is_found(tmp_path: Path, host: str, name: str) -> None:
    checkpoint = save_files(tmp_path, 5)
    copies = {host: copy_of(checkpoint, host) for host in ("left", "right")}
    path = copies[host] / name
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    line = (
        f"{path} is damaged: its checksum is not the one in manifest.json (rank {list(copies).index(host)} on "
        f"{socket.gethostname()}); use another checkpoint"
    )
    by_rank = run_on_ranks(RANKS, verify_as, [str(copy) for copy in copies.values()], list(copies))
    assert [refusal for _, refusal in by_rank] == [line] * RANKS


@pytest.mark.parametrize(("steps", "contents"), [((5, 6), ("", "")), ((5, 5), ("one run", "another run"))])
def test_ranks_that_opened_different_checkpoints_are_refused_with_one_line(
    tmp_path: Path, steps: tuple[int, int], contents: tuple[str, str]
) -> None:
    """As where ``latest`` moves between their opens, or where hosts have folders of different runs."""
    opened = [save_files(tmp_path / str(rank), steps[rank], contents[rank]) for rank in range(RANKS)]
    told = [
        f"{path} (step {steps[rank]}, manifest sha256 {(path / 'manifest.sha256').read_text()[:12]}) on rank {rank} "
        "(host left)"
        for rank, path in enumerate(opened)
    ]
    line = (
        f"the ranks opened different checkpoints: {told[0]} and {told[1]}; give the folder of one step, and all hosts "
        "the same copy of it"
    )
    by_rank = run_on_ranks(RANKS, verify_as, [str(path) for path in opened], ["left"] * RANKS)
    assert [refusal for _, refusal in by_rank] == [line] * RANKS
