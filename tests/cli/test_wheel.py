"""What pip builds and installs is enough to pretrain: from a folder without the repository, on two ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from tests.support.jobs import LAUNCHER_VARIABLES, exact_records, run_job, write_job
from tests.support.ranks import find_free_port

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 240.0
STEPS = 3
PARALLEL = {"tensor_parallel_size": 2}
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]


def pip(*words: object) -> None:
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", words[0], *quiet, *map(str, words[1:])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree; built from a copy, for a build leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("megalibi", "kernels"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, folder / "tree")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is installed in; what it depends on is where it is for the suite."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--target", folder, wheel)
    return folder


@pytest.fixture
def environment(installed: Path) -> dict[str, str]:
    """The environment of a user who has installed the wheel, and has no repository."""
    ours = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES} | ours


def test_the_wheel_has_every_module_and_what_they_read(wheel: Path) -> None:
    packed = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    written = {
        path.relative_to(root).as_posix()
        for root in (ROOT, ROOT / "kernels")
        for package in ("megalibi", "alibi_attention", "fused_ops")
        for path in (root / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".md")
    }
    assert packed == written
    assert "megalibi/py.typed" in packed


def test_the_packages_are_those_of_the_wheel(installed: Path, environment: dict[str, str], tmp_path: Path) -> None:
    names = ("megalibi", "alibi_attention", "fused_ops")
    code = f"import {', '.join(names)}; print({', '.join(f'{name}.__file__' for name in names)})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert [Path(word).parents[1] for word in done.stdout.split()] == [installed] * 3


def test_the_console_script_lists_the_commands(installed: Path, environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [installed / "bin" / "megalibi", "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\n  pretrain " in done.stdout


@pytest.mark.parametrize("words", ["compare-1p3b --scale smoke", "measure-gpu --device cpu --list"])
def test_a_study_that_needs_the_repository_says_so(environment: dict[str, str], tmp_path: Path, words: str) -> None:
    command = [sys.executable, "-m", "megalibi", "study", *words.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    name = words.partition(" ")[0]
    lacking = "must have the repository's configs/, tests/, tools/, which an installed package lacks; get the source of"
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith(f"error: megalibi study {name}: {lacking} megalibi ")


def test_two_ranks_pretrain_from_it_as_they_do_from_the_repository(
    installed: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    started: dict[str, tuple[subprocess.Popen[str], Path]] = {}
    for name, launcher in (
        ("deepspeed", [*DEEPSPEED, str(find_free_port()), "--module", "megalibi"]),
        ("console", [*TORCHRUN, str(find_free_port()), "--no-python", str(installed / "bin" / "megalibi")]),
    ):
        config = write_folder(tmp_path / name)
        process = subprocess.Popen(
            [*launcher, "pretrain", "--config", str(config)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started[name] = process, config.parent / "run"
    records: dict[str, list[dict[str, Any]]] = {}
    for name, (process, run) in started.items():
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == 0, output
        records[name] = exact_records(run)
        assert (run / "checkpoints" / f"step_{STEPS:08d}").is_dir()
    config = write_folder(tmp_path / "repository")
    run_job(config, world_size=2)
    records_ref = exact_records(config.parent / "run")
    assert [record["step"] for record in records_ref] == list(range(1, STEPS + 1))
    assert records == {"deepspeed": records_ref, "console": records_ref}


def write_folder(folder: Path) -> Path:
    folder.mkdir()
    return write_job(folder, train={"steps": STEPS}, parallel=PARALLEL)
