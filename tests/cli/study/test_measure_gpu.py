"""The whole visit at toy size on a CPU, gone on with and asked again; and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from megalibi.cli.study import measure_gpu
from megalibi.studies.gpu_visit.machine import find_gpu, make_environment
from megalibi.studies.gpu_visit.step import DONE, INTERRUPTED, SKIPPED, read_outcomes
from tests.studies.machinery.test_jobs import signal_when
from tests.support.in_process import Runner, make_runner
from tests.support.warm_python import warm_python

TOOL = Path(__file__).parents[3] / "tools" / "measure_gpu.py"
SECONDS = "570"
"""Not the 120 of ``--help``, which are for a machine that does nothing else: the suite may run beside other work, and
no step shall be left out for that."""
IMPOSSIBLE = {"warm", "attention_cuda_graph", "attention_compiled", "extrapolation"}
PARTS = ("matmul", "attention", "cross entropy", "layer norm", "GELU", "optimizer", "gradient accumulation")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    """Run the tool in this process, which has its imports; the steps are processes as ever."""
    return make_runner(measure_gpu.COMMAND, TOOL, monkeypatch, capsys)


@pytest.fixture
def python() -> str:
    return warm_python()


def test_every_step_at_toy_size_and_again(
    python: str, run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", python)
    folder = tmp_path / "results"
    where = ["--device", "cpu", "--seconds", SECONDS, "--output", str(folder), "--scratch", str(tmp_path / "scratch")]
    _, listed, _ = run(*where, "--list")
    names = [line.split()[0] for line in listed.splitlines()]
    assert not folder.exists()
    wanted = {name: SKIPPED if name in IMPOSSIBLE else DONE for name in names}
    code, output, errors = run(*where)
    assert code == 0, output + errors
    records = read_outcomes(folder)
    statuses = {name: record.status for name, record in records.items()}
    assert statuses == wanted, output
    assert output.splitlines()[-1] == f"report: {folder / 'report.md'}"

    summary = json.loads((folder / "summary.json").read_text())
    assert {"command", "commit", "date", "hardware", "versions", "device", "text", "steps"} <= set(summary)
    assert summary["text"].startswith("random ids")
    assert records["contract"].command.startswith("python ")
    assert records["ceilings"].command.startswith("megalibi study measure-device ceilings --device cpu --output")
    check_page((folder / "report.md").read_text())
    profile = json.loads((folder / "profile_step.json").read_text())
    assert all(profile["parts_milliseconds"][part] > 0.0 for part in PARTS)
    # Of the one step that is profiled; the longest operation is left out, for another process may have interrupted it.
    others = sorted(kernel["milliseconds"] for kernel in profile["kernels"] if kernel["part"] == "other")[:-1]
    assert sum(others) < sum(profile["parts_milliseconds"].values()) / 2
    for turn in json.loads((folder / "plan.json").read_text())["turns"].values():
        assert turn["planned_of_measured"] == pytest.approx(1.0, abs=0.03)
    resume = json.loads((folder / "resume.json").read_text())
    assert (resume["equal"], resume["resumed_from"]) == (True, 10)
    assert "passed" in (folder / "logs" / "test_gpu.log").read_text()
    assert (folder / "test_gpu.xml").exists()

    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.json") if path.name != "summary.json"}
    code, output, _ = run(*where, "--only", "machine,ceilings,contract", "--again", "machine")
    assert code == 0
    assert [line.partition(": ")[2] for line in output.splitlines()[2:4]] == ["done before"] * 2
    changed = {path.stem for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"machine"}
    assert set(read_outcomes(folder)) == set(records)


def check_page(page: str) -> None:
    heads = [line for line in page.splitlines() if line.startswith("#")]
    assert heads[0].endswith("(a trial of the visit, at toy size) gives")
    assert heads[1:] == [
        "## What failed or was not done",
        "## What bounds each part of a step",
        "## Training",
        "## Attention, forward and backward",
        "## Ceilings",
        "## Planned memory",
        "## The longest kernels",
        "## The exactness contract",
        "## Steps",
    ]
    assert "- **warm** skipped: Triton compiles for GPUs alone" in page
    assert "| train_sinusoidal: sinusoidal |" in page
    assert "| `sdpa` | float32 | 17 |" in page


BAD_INPUT = {
    "seconds": (["--seconds", "0"], "--seconds=0: must be a number above 0"),
    "only": (
        ["--only", "ceiling"],
        "--only=ceiling: must be names of warm, machine, ceilings, .*, and 'ceiling' is none of them",
    ),
    "data": (["--data", "nowhere"], "nowhere.idx: no such token file"),
    "again": (["--again", "no"], "--again=no: must be names of warm, .*, failed, and 'no' is none of them"),
    "output": (["--output", str(TOOL)], f"--output={TOOL} cannot be written: {TOOL} is no folder"),
}


@pytest.mark.parametrize(("more", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line(run: Runner, tmp_path: Path, more: list[str], message: str) -> None:
    folder = tmp_path / "results"
    code, _, errors = run("--device", "cpu", "--output", str(folder), "--scratch", str(tmp_path / "s"), *more)
    assert (code, len(errors.splitlines())) == (2, 1)
    assert re.search(message, errors)
    assert not folder.exists()


def test_ctrl_c_keeps_what_is_there_and_ends_with_130(run: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    where = ["--device", "cpu", "--output", str(folder), "--scratch", str(tmp_path / "s")]
    with signal_when([tmp_path / "s" / "resume" / "whole" / "run.lock"], signal.SIGINT):
        code, output, errors = run(*where, "--only", "machine,resume")
    assert (code, errors) == (130, "error: interrupted\n"), output
    assert {name: record.status for name, record in read_outcomes(folder).items()} == {
        "machine": DONE,
        "resume": INTERRUPTED,
    }
    assert "- **resume** interrupted" in (folder / "report.md").read_text()


def test_results_of_another_machine_are_left_alone(run: Runner, tmp_path: Path) -> None:
    summary = '{"device": "cuda", "hardware": {"gpu": "NVIDIA H200"}, "steps": []}'
    (tmp_path / "summary.json").write_text(summary)
    code, _, errors = run("--device", "cpu", "--output", str(tmp_path), "--scratch", str(tmp_path / "s"))
    assert code == 2
    assert errors == (
        f"error: --output={tmp_path}: must hold results of device=cpu, and holds some of cuda; give another folder\n"
    )
    assert (tmp_path / "summary.json").read_text() == summary


@pytest.mark.parametrize("visible", [None, "1", ""], ids=["unset", "second card", "none"])
def test_the_card_is_what_the_driver_says(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None
) -> None:
    """Said by a script that answers as nvidia-smi does, for there may be no GPU here."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\ncase \"$*\" in *'-i 1') echo 'NVIDIA H100 PCIe, 570.1';; *) echo 'NVIDIA H200, 580.159.04';; esac\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = find_gpu(os.environ)
    expected = {None: ("NVIDIA H200", "580.159.04"), "1": ("NVIDIA H100 PCIe", "570.1"), "": None}[visible]
    assert gpu == ({} if expected is None else dict(zip(("gpu", "driver"), expected, strict=True)))
    code, output, _ = run("--list", "--output", str(tmp_path / "results"))
    assert code == 0
    assert ("steps of the 1.3B model, ALiBi" in output) == (expected is not None)
    assert (" s, an estimate" in output) == (expected is not None)
    if expected is not None:
        assert make_environment(os.environ, tmp_path, "cuda")["CUDA_VISIBLE_DEVICES"] == (visible or "0")


def test_a_bad_build_of_a_peer_ends_no_visit(run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c104cuda')\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="undefined symbol"):
        importlib.util.find_spec("flash_attn.cute")  # as it is to be
    usable, compiled = measure_gpu.find_peers("cuda")
    assert compiled == ["flex"]
    assert not [name for name in usable if "flash" in name]
    code, _, errors = run("--device", "cpu", "--list", "--output", str(tmp_path / "results"))
    assert (code, errors) == (0, "")


def test_help_has_an_example(run: Runner) -> None:
    code, output, _ = run("--help")
    assert code == 0
    assert f"python {TOOL} --device cpu --seconds 120 --output" in output
