"""A checkpoint that is written while the training goes on is the one that would have been written at once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalibi.checkpoint import CheckpointSaver
from megalibi.checkpoint.writing.rank_files import write_rank_files
from megalibi.checkpoint.writing.snapshot import Snapshot, count_snapshot_bytes
from megalibi.checkpoint.writing.task import BackgroundTask
from megalibi.config import Config
from megalibi.errors import FileError
from tests.support.ranks import run_on_ranks
from tests.support.runs import build, make_config, write_tokens
from tests.support.saving import make_saver, take_steps


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens"), num_tokens=10_000)


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save_in_both_ways(config: Config, folder: Path) -> list[bool]:
    """Save two steps at once and in the background, with steps in between; return what is equal to what."""
    engine, groups = build(config)
    at_once, background = (make_saver(config, engine, groups, folder / name) for name in ("at_once", "background"))
    equal = []
    snapshot = Snapshot()
    for step in (2, 4):
        take_steps(config, engine, groups, step - 2, step)
        path = at_once.save(step)
        files = at_once._list_files()
        copied = snapshot.copy(files)
        background.begin(step)
        assert background.pending_step == step
        take_steps(config, engine, groups, step, step + 2)
        equal.append(background.finish() == step)
        equal.append(read_folder(path) == read_folder(folder / "background" / path.name))
        written = folder / f"copied_{step}_{groups.world.rank}"
        written.mkdir()
        entries = write_rank_files(written, copied)  # for sure after the steps have changed the values
        equal.append(all((written / name).read_bytes() == (path / name).read_bytes() for name in entries))
        sizes = [entry.size_bytes for entry in entries.values()]
        equal.append(0 < count_snapshot_bytes(files) < sum(sizes) < count_snapshot_bytes(files) + 20_000)
        pairs = [pair for name in entries for pair in zip(files.contents[name], copied.contents[name], strict=True)]
        equal.append(any(not torch.equal(now, then) for (_, now), (_, then) in pairs))
    assert background.poll() is background.finish() is None
    engine.destroy()
    return equal


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "fp32")])
def test_what_steps_do_meanwhile_changes_no_byte(prefix: str, tmp_path: Path, stage: int, precision: str) -> None:
    config = make_config(prefix, zero={"stage": stage}, train={"precision": precision})
    assert run_on_ranks(2, save_in_both_ways, config, tmp_path) == [[True] * 10] * 2


def meet_obstacles(config: Config, folder: Path) -> list[str]:
    """Save in the background where a file of rank 1, or the manifest, cannot be written; return what is said."""
    engine, groups = build(config)
    saver = make_saver(config, engine, groups, folder)
    saver.save(1)
    make_partial, said = saver._make_partial, []
    for name in ("weights_tensor_00_data_0001.safetensors", "manifest.json"):
        saver._make_partial = lambda step, name=name: _put_in_the_way(make_partial(step), name)
        saver.begin(2)
        with pytest.raises(FileError) as refusal:
            poll_until_done(saver)
        said.append(str(refusal.value))
        assert saver.pending_step is None
    saver._make_partial = make_partial
    saver.begin(2)
    said.append(str(saver.finish()))
    engine.destroy()
    return said


def poll_until_done(saver: CheckpointSaver) -> None:
    while saver.poll() is None:
        pass


def _put_in_the_way(partial: Path, name: str) -> Path:
    if dist.get_rank() == 0:
        (partial / name).mkdir()
    dist.barrier()
    return partial


def test_what_one_rank_meets_in_the_background_is_raised_on_every_rank(prefix: str, tmp_path: Path) -> None:
    lines = run_on_ranks(2, meet_obstacles, make_config(prefix), tmp_path)
    assert lines[0] == lines[1]
    start = f"checkpoint not written, the one before it stays: {tmp_path}/step_00000002.partial/"
    assert lines[0] == [
        f"{start}weights_tensor_00_data_0001.safetensors: Is a directory",
        f"{start}manifest.json: Is a directory",
        "2",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001", "step_00000002"]


def test_a_task_returns_or_raises_what_its_work_does() -> None:
    gate = threading.Event()
    task = BackgroundTask(lambda: gate.wait(10))
    assert not task.is_done
    gate.set()
    assert task.result() is True
    assert task.is_done
    failing = BackgroundTask(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        failing.result()
