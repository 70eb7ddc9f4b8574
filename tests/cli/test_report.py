from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megalibi.metrics.records import StepRecord
from tests.support.warm_python import warm_python

REPOSITORY = Path(__file__).parents[2]


def run_tool(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [warm_python(), str(REPOSITORY / "tools" / "report.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("model:\n  num_layers: 2\n")
    return folder


def test_the_last_line_names_the_page(run_dir: Path, tmp_path: Path) -> None:
    done = run_tool(run_dir, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]) == run_dir / "report.html"
    assert (run_dir / "report.html").exists()


def test_several_runs_get_a_page_of_their_own(run_dir: Path, tmp_path: Path) -> None:
    done = run_tool(run_dir, run_dir, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "report.html"
    assert "2 runs" in (tmp_path / "report.html").read_text()


def test_the_output_can_be_named(run_dir: Path, tmp_path: Path) -> None:
    done = run_tool(run_dir, "--output", tmp_path / "a" / "b.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "b.html").exists()


def test_pictures(run_dir: Path, tmp_path: Path) -> None:
    step = StepRecord(
        step=1, tokens=9, loss=3.0, grad_norm=1.0, learning_rate=0.1, step_seconds=1.0, tokens_per_second=9.0,
        model_tflops_per_second=0.1, model_tflops_per_second_causal=0.1, memory_bytes=1, memory_peak_bytes=1,
        sample_hash="0" * 16,
    )  # fmt: skip
    (run_dir / "metrics.jsonl").write_text(step.to_json() + "\n")
    done = run_tool(run_dir, "--pictures", tmp_path / "pictures", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("loss", "speed"):
        assert (tmp_path / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run_tool(tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: run {tmp_path}: holds neither")
    assert done.stderr.count("\n") == 1


def test_what_cannot_be_written_is_said_before_anything_is(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures" / "loss.png").mkdir(parents=True)
    for options, message in (
        (["--output", tmp_path], f"--output={tmp_path}: must be the name of a file, and is a folder"),
        (["--pictures", run_dir / "config.yaml"], f"--pictures={run_dir}/config.yaml cannot be written: "),
        (["--pictures", tmp_path / "pictures"], f"--pictures={tmp_path}/pictures cannot be written: "),
    ):
        done = run_tool(run_dir, "--pictures", tmp_path / "new", *options, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {message}")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_help_has_an_example(tmp_path: Path) -> None:
    done = run_tool("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert f"python {REPOSITORY}/tools/report.py runs/quickstart" in done.stdout
