"""Opening a checkpoint by any of its names, and verifying its files: alone, and shared among ranks."""

from __future__ import annotations

import hashlib
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from megalibi.checkpoint import Checkpoint, check_resumable, load_checkpoint, save_checkpoint
from megalibi.checkpoint.checkpoint import _share_files
from megalibi.checkpoint.manifest import FileEntry, Manifest, read_manifest
from megalibi.config import Config, derive
from megalibi.errors import CheckpointError, UserError
from tests.support.checkpoints import assert_whole, counting_hashed_bytes, save_files
from tests.support.ranks import run_on_ranks
from tests.support.runs import CPU, build, identify, make_config, process_groups, write_tokens

RANKS = 2


def test_a_step_a_run_and_its_checkpoints_are_opened(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    first, last = (save_files(folder, step) for step in (1, 2))
    for path in (tmp_path, folder, last, last.parent / "." / last.name):
        assert Checkpoint.open(path).manifest.step == 2
    assert Checkpoint.open(tmp_path).path == last
    assert Checkpoint.open(first).manifest.step == 1
    (folder / "latest").write_text(first.name)
    assert Checkpoint.open(tmp_path).path == Checkpoint.open(folder).path == first
    (folder / "latest").write_text("step_00000009")
    with pytest.raises(CheckpointError, match="latest names 'step_00000009', which is no complete checkpoint"):
        Checkpoint.open(tmp_path)


def test_one_flipped_byte_anywhere_in_any_file_is_found_and_named(tmp_path: Path) -> None:
    checkpoint = save_files(tmp_path, 5)
    for path in sorted(checkpoint.iterdir()):
        data = path.read_bytes()
        for place in range(len(data)):
            path.write_bytes(data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :])
            assert path.stem in find_first_damage(checkpoint)
        path.write_bytes(data)
    assert assert_whole(checkpoint) == 5


def test_truncated_and_missing_files_are_found_and_named(tmp_path: Path) -> None:
    checkpoint = save_files(tmp_path, 5)
    for path in sorted(checkpoint.iterdir()):
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        assert path.stem in find_first_damage(checkpoint)
        path.unlink()
        assert path.name in find_first_damage(checkpoint)
        path.write_bytes(data)
    assert assert_whole(checkpoint) == 5


def find_first_damage(checkpoint: Path) -> str:
    try:
        return next(Checkpoint(checkpoint, read_manifest(checkpoint)).find_damage())
    except CheckpointError as error:
        return str(error)


def test_shares_of_the_verification_cover_every_file(tmp_path: Path) -> None:
    checkpoint = save_files(tmp_path, 5)
    opened = Checkpoint.open(checkpoint)
    for name in ("a.pt", "b.pt"):
        (checkpoint / name).unlink()
    shares = [list(opened.find_damage(part=part, parts=3)) for part in range(3)]
    assert sorted(len(share) for share in shares) == [0, 1, 1]


def test_the_shares_of_the_ranks_are_of_about_equal_size() -> None:
    """The optimizer's files are the large ones: each rank gets some of them."""
    sizes = {"o0": 60, "o1": 60, "m0": 20, "m1": 20, "z": 1}
    files = {name: FileEntry(size_bytes=size, sha256="") for name, size in sizes.items()}
    manifest = Manifest(step=1, samples_consumed=0, topology={}, config={}, derived={}, versions={}, files=files)
    assert _share_files(manifest, 1) == [["o0", "o1", "m0", "m1", "z"]]
    assert _share_files(manifest, 2) == [["o0", "m0", "z"], ["o1", "m1"]]
    assert _share_files(manifest, 7) == [["o0"], ["o1"], ["m0"], ["m1"], ["z"], [], []]


def make_small_config(prefix: str, folder: Path, stage: int) -> Config:
    return make_config(
        prefix,
        parallel={"tensor_parallel_size": RANKS},
        zero={"stage": stage},
        train={"output_dir": str(folder / f"zero{stage}")},
    )


def save_all(configs: list[Config]) -> None:
    for config in configs:
        engine, groups = build(config)
        derived, folder = derive(config, groups.world.size), Path(config.train.output_dir)
        save_checkpoint(engine, config, derived, identify(config), groups, folder=folder, step=1, run_id="a")
        engine.destroy()


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> list[Config]:
    """Runs of two tensor ranks, with a checkpoint each."""
    folder = tmp_path_factory.mktemp("runs")
    prefix = write_tokens(folder, num_tokens=2000)
    configs = [make_small_config(prefix, folder, stage) for stage in (1, 3)]
    run_on_ranks(RANKS, save_all, configs)
    return configs


def count_hashed(configs: list[Config]) -> list[tuple[int, int]]:
    """Return what this rank hashes of each checkpoint: to load the model, and to resume."""
    counts = []
    for config in configs:
        checkpoint = Checkpoint.open(Path(config.train.output_dir))
        with counting_hashed_bytes() as of_model:
            checkpoint.load_model(CPU, process_groups(RANKS))
        engine, groups = build(config)
        with counting_hashed_bytes() as of_resume:
            check_resumable(checkpoint.path, config, identify(config))
            of_resume[0] = 0  # the identity of the text, and the manifest
            load_checkpoint(engine, checkpoint.path, groups)
        engine.destroy()
        counts.append((of_model[0], of_resume[0]))
    return counts


def test_each_file_is_hashed_once_and_the_ranks_share_the_work(configs: list[Config]) -> None:
    by_rank = run_on_ranks(RANKS, count_hashed, configs)
    for number, config in enumerate(configs):
        checkpoint = Checkpoint.open(Path(config.train.output_dir))
        whole = sum(path.stat().st_size for path in checkpoint.path.glob("*.safetensors"))
        # Every rank hashes all of the manifest: when it reads it, and when it compares it with that of the others.
        manifest_bytes = (checkpoint.path / "manifest.json").stat().st_size
        assert manifest_bytes < whole / 50
        for_model = [counts[number][0] - manifest_bytes for counts in by_rank]
        for_resume = [counts[number][1] - 2 * manifest_bytes for counts in by_rank]
        for shares in (for_model, for_resume):
            assert sum(shares) == whole
            assert max(shares) < 0.6 * whole


def load_one(config: Config, folder: str) -> tuple[str, str]:
    """Return the kind and the line with which loading the model is refused on this rank."""
    with pytest.raises(UserError) as refusal:
        Checkpoint.open(Path(folder)).load_model(CPU, process_groups(RANKS))
    return type(refusal.value).__name__, str(refusal.value)


@pytest.mark.parametrize(
    "name", ["weights_tensor_00_data_0000.safetensors", "optimizer_tensor_01_data_0000.safetensors"]
)
def test_a_bad_file_is_refused_on_all_ranks_with_the_same_line(
    configs: list[Config], tmp_path: Path, name: str
) -> None:
    """Whichever rank reads it; the file and the host are named."""
    checkpoint = Checkpoint.open(Path(configs[0].train.output_dir))
    copy = tmp_path / checkpoint.path.name
    shutil.copytree(checkpoint.path, copy)
    reader = next(rank for rank, share in enumerate(_share_files(checkpoint.manifest, RANKS)) if name in share)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    line = (
        f"{copy / name} is damaged: its checksum is not the one in manifest.json (rank {reader} on "
        f"{socket.gethostname()}); use another checkpoint"
    )
    assert run_on_ranks(RANKS, load_one, configs[0], str(copy)) == [("CheckpointError", line)] * RANKS


def change_manifest(checkpoint: Path, change: Any) -> None:
    """Write another manifest with its checksum, as whoever can write the files can."""
    path = checkpoint / "manifest.json"
    path.write_text(change(path.read_text()))
    (checkpoint / "manifest.sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"final_norm.weight": {"shape": [48]', '"final_norm.weight": {"shape": [47]'),
        ('"final_norm.weight"', '"final_norm.scale"'),
        ('"num_layers": 2', '"num_layers": 3'),
    ],
)
def test_a_manifest_whose_parameters_are_not_the_models_is_refused(
    configs: list[Config], tmp_path: Path, old: str, new: str
) -> None:
    copy = tmp_path / "step_00000001"
    shutil.copytree(Checkpoint.open(Path(configs[0].train.output_dir)).path, copy)
    assert old in (copy / "manifest.json").read_text()
    change_manifest(copy, lambda text: text.replace(old, new))
    with pytest.raises(CheckpointError, match="has parameters that are not those of its configuration") as refusal:
        Checkpoint.open(copy).load_model(CPU)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"final_norm.weight": {"shape": [48]', '"final_norm.weight": {"shape": [49]'),
        ('"final_norm.weight": {"shape": [48]', '"final_norm.weight": {"shape": [47]'),
        ('"final_norm.weight"', '"final_norm.scale"'),
        ('"shape": [48, 96], "dtype": "float32", "shard": {"dim": 1, "full_size": 96',
         '"shape": [48, 98], "dtype": "float32", "shard": {"dim": 1, "full_size": 98'),
        ('"shape": [48, 96], "dtype": "float32", "shard": {"dim": 1, "full_size": 96',
         '"shape": [48, 97], "dtype": "float32", "shard": {"dim": 1, "full_size": 97'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("number", [0, 1], ids=["ZeRO 1", "ZeRO 3"])
def test_weights_that_are_not_as_described_are_refused(
    configs: list[Config], tmp_path: Path, number: int, old: str, new: str
) -> None:
    copy = tmp_path / "step_00000001"
    shutil.copytree(Checkpoint.open(Path(configs[number].train.output_dir)).path, copy)
    assert old in (copy / "manifest.json").read_text()
    change_manifest(copy, lambda text: text.replace(old, new))
    with pytest.raises(CheckpointError, match=f"{copy} does not hold .* as manifest.json describes it") as refusal:
        dict(Checkpoint.open(copy).read_weights())
    assert "\n" not in str(refusal.value)
