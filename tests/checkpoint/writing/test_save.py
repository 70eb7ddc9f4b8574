from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megalibi.checkpoint import (
    Manifest,
    list_checkpoints,
    load_checkpoint,
)
from megalibi.checkpoint.manifest import FileEntry
from megalibi.checkpoint.writing.save import _commit
from megalibi.config import Config
from megalibi.engine.step import StepResult
from megalibi.errors import CheckpointError, FileError
from megalibi.parallel import ProcessGroups
from tests.support.checkpoints import assert_whole
from tests.support.full_disk import FREE_BYTES
from tests.support.ranks import run_on_ranks
from tests.support.runs import STAGES, build, make_config, write_tokens
from tests.support.saving import save, take_steps

STEPS = 12
SAVED_STEP = 6
FULL_DISK_SCRIPT = Path(__file__).parents[2] / "support" / "full_disk.py"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


def run_straight_and_resumed(config: Config, folder: str) -> tuple[list[StepResult], list[StepResult]]:
    engine, groups = build(config)
    straight = take_steps(config, engine, groups, 0, SAVED_STEP)
    checkpoint = save(config, engine, groups, folder, SAVED_STEP)
    straight += take_steps(config, engine, groups, SAVED_STEP, STEPS)
    engine.destroy()

    engine, groups = build(config)
    manifest = load_checkpoint(engine, checkpoint, groups)
    assert manifest.step == SAVED_STEP
    assert manifest.samples_consumed == SAVED_STEP * config.train.global_batch_size
    resumed = straight[:SAVED_STEP] + take_steps(config, engine, groups, SAVED_STEP, STEPS)
    engine.destroy()
    return straight, resumed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_the_straight_run_bit_for_bit(
    prefix: str, tmp_path: Path, stage: int, tensor: int, precision: str
) -> None:
    config = make_config(
        prefix,
        parallel={"tensor_parallel_size": tensor},
        zero={"stage": stage},
        train={"precision": precision},
        model={"dropout": 0.1},
    )
    for straight, resumed in run_on_ranks(2, run_straight_and_resumed, config, str(tmp_path)):
        assert resumed == straight
        assert straight[-1].loss < straight[0].loss
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", f"step_{SAVED_STEP:08d}"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_adaptive_model_under_nesterov_resumes_bit_for_bit(prefix: str, tmp_path: Path, stage: int) -> None:
    config = make_config(
        prefix,
        zero={"stage": stage},
        optimizer={"kind": "nesterov", "learning_rate": 0.3, "weight_decay": 0.01},
        model={"adaptive_cutoffs": [41, 122], "dropout": 0.1, "activation_dropout": 0.1,
               "adaptive_softmax_dropout": 0.2},
    )  # fmt: skip
    for straight, resumed in run_on_ranks(2, run_straight_and_resumed, config, str(tmp_path)):
        assert resumed == straight
        assert straight[-1].loss < straight[0].loss


def test_the_loss_scale_of_fp16_survives(prefix: str, tmp_path: Path) -> None:
    # ZeRO 0: on a CPU, DeepSpeed has fp16 at no other stage.
    # Large weights let gradients overflow at the first scale, so that the scale has a history to remember.
    config = make_config(prefix, zero={"stage": 0}, train={"precision": "fp16"}, model={"init_std": 0.5})
    for straight, resumed in run_on_ranks(2, run_straight_and_resumed, config, str(tmp_path)):
        assert resumed == straight
        assert straight[SAVED_STEP].loss_scale < straight[0].loss_scale
        assert any(result.skipped for result in straight[:SAVED_STEP])


def load_damaged(config: Config, folder: str) -> dict[str, str]:
    """Save; then flip a byte of, truncate and remove each file in turn; return what loading said of each."""
    engine, groups = build(config)
    checkpoint = save(config, engine, groups, folder, 1)
    said = {}
    for path in sorted(checkpoint.iterdir()):
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        for damage, data in (("flipped", flipped), ("truncated", whole[:-1]), ("missing", None)):
            _on_rank_0(groups, path, data)
            try:
                load_checkpoint(engine, checkpoint, groups)
            except CheckpointError as error:
                said[f"{path.name} {damage}"] = str(error)
            _on_rank_0(groups, path, whole)
    load_checkpoint(engine, checkpoint, groups)
    engine.destroy()
    return said


def _on_rank_0(groups: ProcessGroups, path: Path, data: bytes | None) -> None:
    import torch.distributed as dist

    dist.barrier()
    if groups.world.rank == 0:
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
    dist.barrier()


def test_damage_to_any_file_is_found_on_every_rank_and_named(prefix: str, tmp_path: Path) -> None:
    config = make_config(prefix, parallel={"tensor_parallel_size": 2})
    by_rank = run_on_ranks(2, load_damaged, config, str(tmp_path))
    assert by_rank[0] == by_rank[1]
    names = sorted(path.name for path in (tmp_path / "step_00000001").iterdir())
    assert len(names) == 6  # weights and optimizer of two ranks, manifest and its checksum
    assert sorted(by_rank[0]) == sorted(f"{n} {d}" for n in names for d in ("flipped", "truncated", "missing"))
    for case, message in by_rank[0].items():
        assert "\n" not in message
        assert case.split()[0] in message


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """A real one: a small tmpfs in a mount namespace of its own."""
    mount = 'mount -t tmpfs -o size=6m tmpfs "$0" && exec "$@"'
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", mount, str(disk)]
    command += [sys.executable, str(FULL_DISK_SCRIPT), str(disk), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FULL_DISK_SCRIPT.parents[2], check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])  # DeepSpeed prints before it
    assert len(result["cases"]) == len(FREE_BYTES)
    for case in result["cases"]:
        (error,) = (line for line in case["log"].splitlines() if line.startswith("error: "))
        assert "No space left on device" in error, case
        assert "Traceback" not in case["log"], case
        assert case["codes"][0] == 2, case
        assert case["codes"][1] != 0, case
        assert case["checkpoints"] == ["latest", "step_00000002"], case
        assert case["damage"] == [], case
    assert result["after"] == {"codes": [0, 0], "last_step": 4}


def save_again(config: Config, folder: str, kind: str) -> str:
    """Save a step again when ``latest`` cannot be used; return the line with which this rank refuses."""
    engine, groups = build(config)
    for step in (1, 2):
        save(config, engine, groups, folder, step)
    latest = Path(folder) / "latest"
    if groups.world.rank == 0:
        latest.unlink()
        latest.mkdir() if kind == "a folder" else os.mknod(latest, stat.S_IFSOCK | 0o600)
    with pytest.raises(FileError) as refusal:
        save(config, engine, groups, folder, 2)
    engine.destroy()
    return str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("a folder", "is a folder: must be a file with the name of a checkpoint, or a link to one"),
        ("a socket", "cannot be read: No such device or address"),
    ],
)
def test_a_latest_that_cannot_be_used_ends_all_ranks_with_one_line(
    prefix: str, tmp_path: Path, kind: str, problem: str
) -> None:
    """Rank 0 alone reads it, while the others wait for its word."""
    line = f"checkpoint not written, the one before it stays: {tmp_path / 'latest'} {problem}"
    assert run_on_ranks(2, save_again, make_config(prefix), str(tmp_path), kind) == [line] * 2
    assert [assert_whole(checkpoint) for checkpoint in list_checkpoints(tmp_path)] == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001", "step_00000002"]


def test_files_that_rank_0_does_not_see_are_no_checkpoint(tmp_path: Path) -> None:
    """As where each host has a disk of its own: renaming it would let the last whole checkpoint be deleted."""
    partial = tmp_path / "step_00000002.partial"
    partial.mkdir()
    files = {"of_another_host.pt": FileEntry(size_bytes=1, sha256="")}
    manifest = Manifest(step=2, samples_consumed=0, topology={}, config={}, derived={}, versions={}, files=files)
    with pytest.raises(FileError, match="rank 0 does not see"):
        _commit(partial, manifest)
    assert list_checkpoints(tmp_path) == []
