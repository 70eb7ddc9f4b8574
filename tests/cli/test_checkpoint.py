"""``megalibi checkpoint`` on a checkpoint of two ranks in either format: what it shows, and what damage it names."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from megalibi.checkpoint.tensors.state_file import name_state_file
from tests.support.jobs import run_job, write_job
from tests.support.warm_python import warm_python

FORMAT_1 = Path(__file__).parents[1] / "checkpoint" / "e4f2636" / "step_00000003"
PARAMETERS = 61 * 16 + 2 * (2 * 2 * 16 + 16 * 48 + 48 + 16 * 16 + 16 + 16 * 32 + 32 + 32 * 16 + 16) + 2 * 16
"""Of the model that e4f2636/make.py trains: the embedding without padding, two blocks, the last norm."""


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [warm_python(), "-m", "megalibi", "checkpoint", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    run_job(write_job(folder))
    return folder / "run"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    return shutil.copytree(FORMAT_1, tmp_path / FORMAT_1.name)


def test_an_old_checkpoint_is_shown_from_its_manifest_alone(damaged: Path, tmp_path: Path) -> None:
    files = list(damaged.glob("*.pt"))
    size = sum(path.stat().st_size for path in files)
    for path in files:
        path.unlink()
    done = run("show", damaged, "--json", tmp_path / "shown.json")
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert rows["step"].rstrip() == "3 (12 samples)"
    assert rows["format"].rstrip() == "1"
    assert rows["ranks"].rstrip() == "2 = tensor 2 x data 1, ZeRO 1"
    assert rows["parameters"].startswith(f"{PARAMETERS:,} in ")
    shown = json.loads((tmp_path / "shown.json").read_text())
    assert (shown["step"], shown["parameters"], shown["precision"]) == (3, PARAMETERS, "fp32")
    assert (sorted(shown["files"]), shown["file_bytes"]) == (sorted(path.name for path in files), size)


def test_the_latest_checkpoint_of_a_run_is_shown_with_its_text(finished: Path) -> None:
    done = run("show", finished)
    assert done.returncode == 0, done.stderr
    assert "step_00000006" in done.stdout
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    (text,) = [value for name, value in rows if name == "data.train"]
    assert " tokens in " in text
    assert "format" in dict(rows)


def test_whole_files_are_said_to_be_so(finished: Path) -> None:
    done = run("verify", finished)
    assert done.returncode == 0, done.stderr
    files, numbers, parameters = done.stdout.splitlines()
    assert files.endswith("all as they were written")
    assert numbers.endswith("finite, and the same on all tensor ranks")
    said = "those of its configuration, from which its 4 slopes follow, 0.25 to 0.003906"
    assert parameters.endswith(f" parameters: {said}")


def test_every_damaged_file_is_named_on_one_line(damaged: Path) -> None:
    missing, flipped, *_ = sorted(damaged.glob("*.pt"))
    missing.unlink()
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    done = run("verify", damaged)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert f"{missing} is missing" in done.stderr
    assert f"{flipped} is damaged: its checksum is not the one in manifest.json" in done.stderr
    assert done.stderr.startswith("error: 2 of 4 files: ")


def change_number(checkpoint: Path, name: str, key: str, value: float) -> None:
    """Change the first number of a tensor, and the manifest and its checksum with it."""
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    header_bytes = int.from_bytes(content[:8], "little")
    begin = 8 + header_bytes + json.loads(content[8 : 8 + header_bytes])[key]["data_offsets"][0]
    content[begin : begin + 4] = struct.pack("<f", value)
    path.write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name]["sha256"] = hashlib.sha256(content).hexdigest()
    text = json.dumps(manifest)
    (checkpoint / "manifest.json").write_text(text)
    (checkpoint / "manifest.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())


def test_numbers_that_are_not_finite_or_not_the_same_on_all_ranks_are_named(tmp_path: Path) -> None:
    config = write_job(tmp_path, parallel={"tensor_parallel_size": 2})
    run_job(config, "train.steps=2", world_size=2)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    done = run("verify", checkpoint)
    assert done.returncode == 0, done.stderr
    assert "finite, and the same on all tensor ranks" in done.stdout
    change_number(checkpoint, name_state_file("weights", 1, 0), "weight/final_norm.weight", 7.0)
    change_number(checkpoint, name_state_file("optimizer", 1, 0), "exp_avg/embedding.weight", math.nan)
    done = run("verify", checkpoint)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr == (
        f"error: {checkpoint}: embedding.weight has 1 numbers that are not finite in its exp_avg; "
        "final_norm.weight has another weight on tensor rank 1 than on tensor rank 0; use another checkpoint\n"
    )


def test_show_says_whether_a_configuration_goes_on_and_why_not(finished: Path) -> None:
    config = finished.parent / "config.yaml"
    done = run("show", finished, "--config", config)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"{config}: can go on from it\n")
    done = run("show", finished, "--config", config, "zero.stage=3", "train.steps=9")
    assert done.stdout.endswith(
        "can go on from it, with other values than before: train.steps 6 -> 9, zero.stage 1 -> 3\n"
    )
    done = run("show", finished, "--config", config, "model.num_layers=3", "train.seed=5")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("error: model.num_layers=3: must be 2, the value in the checkpoint ")
    assert "; train.seed=5: must be 1234, the value in the checkpoint " in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", str(FORMAT_1), "zero.stage=3"], "error: zero.stage=3: must stand behind --config FILE"),
        (["show", "nowhere"], "error: nowhere"),
        (["verify", str(FORMAT_1), "--json", "a.json"], "error: --json=a.json: must be given to show"),
        (["show", str(FORMAT_1), "--json", "/"], "error: --json=/: must be the name of a file, and is a folder"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith(message)
