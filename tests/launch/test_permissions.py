"""Files and folders that a user may not read, met by real processes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from megalibi.checkpoint import find_checkpoint
from tests.support.jobs import LAUNCHER_VARIABLES, SCRIPT, run_job, torchrun_environment, write_job
from tests.support.warm_python import warm_python

ROOT = Path(__file__).parents[2]
WITHOUT_PRIVILEGES = ROOT / "tests" / "support" / "without_privileges.py"
SECONDS = 120.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank with a checkpoint at step 2."""
    config = write_job(tmp_path_factory.mktemp("alone"))
    run_job(config, "train.steps=2")
    return config


def copy_run(config: Path, folder: Path) -> Path:
    """Return the checkpoint of a copy of the run."""
    shutil.copytree(config.parent / "run", folder / "run")
    checkpoint = find_checkpoint(folder / "run" / "checkpoints")
    assert checkpoint is not None
    return checkpoint


ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES},
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
}


def start_rank(config: Path, *overrides: str, environment: dict[str, str], held: bool) -> subprocess.Popen[str]:
    """Start a rank of a job; ``held``: that may not read what the permissions refuse."""
    return subprocess.Popen(
        [warm_python(), *([WITHOUT_PRIVILEGES] if held else []), SCRIPT, "--config", config, *overrides],
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_tool(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that may not read what the permissions refuse."""
    return subprocess.run(
        [warm_python(), WITHOUT_PRIVILEGES, *command],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.mark.parametrize(
    ("closed", "mode"),
    [
        (".", 0o300),  # it may be written
        ("step_00000002", 0o000),
        ("step_00000002/manifest.json", 0o000),
        ("step_00000002/weights_tensor_00_data_0000.safetensors", 0o000),
    ],
)
def test_what_may_not_be_read_is_one_line(config: Path, tmp_path: Path, closed: str, mode: int) -> None:
    path = copy_run(config, tmp_path).parent / closed
    path.chmod(mode)
    job = start_rank(config, f"train.output_dir={tmp_path / 'run'}", environment={}, held=True)
    _, errors = job.communicate(timeout=SECONDS)
    path.chmod(0o700)
    assert job.returncode == 2, errors
    (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert str(path) in line
    assert "Permission denied" in line
    assert "Traceback" not in errors


def test_a_rank_that_may_not_read_a_file_ends_all(tmp_path: Path) -> None:
    """As on a host whose user has other rights: rank 1 is refused a file that rank 0 may read."""
    config = write_job(tmp_path, parallel={"tensor_parallel_size": 2})
    run_job(config, "train.steps=2", world_size=2)
    path = tmp_path / "run" / "checkpoints" / "step_00000002" / "weights_tensor_01_data_0000.safetensors"
    path.chmod(0o000)
    ranks = [
        start_rank(config, environment=environment, held=rank == 1)
        for rank, environment in enumerate(torchrun_environment(2))
    ]
    said = [rank.communicate(timeout=SECONDS)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    (line,) = (line for line in "".join(said).splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: {path}: Permission denied (rank ")
    if os.geteuid() == 0:
        assert f"(rank 1 on {socket.gethostname()})" in line
    assert "Traceback" not in "".join(said)


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (
            ["evaluate.py", "--lengths", "32", "--tokens", "200", "--output", "o.json"],
            "Permission denied",
        ),
        (["capture_qk.py", "--length", "32", "--output", "o.pt"], "Permission denied"),
    ],
)
def test_a_tool_says_what_it_may_not_read(config: Path, tmp_path: Path, tool: list[str], message: str) -> None:
    checkpoint = copy_run(config, tmp_path)
    path = checkpoint / "weights_tensor_00_data_0000.safetensors"
    path.chmod(0o000)
    options = ["--checkpoint", checkpoint, "--data", config.parent / "tokens", *tool[1:]]
    done = run_tool([ROOT / "tools" / tool[0], *options], tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert str(path) in line
    assert f"{path}: {message}" in line
    assert "Traceback" not in done.stderr


def test_a_folder_of_checkpoints_that_may_not_be_read_is_said_by_a_tool(config: Path, tmp_path: Path) -> None:
    folder = copy_run(config, tmp_path).parent
    folder.chmod(0o000)
    options = ["--checkpoint", tmp_path / "run", "--data", config.parent / "tokens", "--output", "o.pt"]
    done = run_tool([ROOT / "tools" / "capture_qk.py", *options], tmp_path)
    folder.chmod(0o700)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {folder}")
    assert len(done.stderr.splitlines()) == 1
    assert f"{folder}: Permission denied; ask its owner" in done.stderr
