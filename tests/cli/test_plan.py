from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalibi.cli import plan
from megalibi.units import format_bytes
from tests.support.in_process import make_runner

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "plan_run.py"
CONFIG = ROOT / "configs" / "quickstart.yaml"
STUDY = ROOT / "configs" / "compare_smoke.yaml"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the tool in this process: its exit code, standard output and standard error."""
    return make_runner(plan.COMMAND, TOOL, monkeypatch, capsys)


def test_end_to_end(tmp_path):
    output = tmp_path / "new" / "plan.json"
    command = [
        sys.executable,
        str(TOOL),
        str(CONFIG),
        "--gpu",
        "h100",
        "train.micro_batch_size=4",
        "--json",
        str(output),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    plan = json.loads(output.read_text())
    assert {"command", "commit", "date", "hardware", "versions", "config"} <= set(plan)
    assert plan["ranks"] == 2  # tensor parallel 2
    assert plan["config"]["train"]["micro_batch_size"] == 4
    assert plan["memory"]["total"] == sum(size for kind, size in plan["memory"].items() if kind != "total")
    assert plan["fits"] is True
    assert f"host memory of a rank, in addition  {format_bytes(plan['snapshot_bytes'])}" in done.stdout
    for words in (f"{plan['parameters']:,}", "4,096", "attention causal", "optimizer states", "tensor all-reduce"):
        assert words in done.stdout
    assert f"largest train.micro_batch_size that fits: {plan['largest_micro_batch']}" in done.stdout


def test_another_deepspeed_than_the_replayed_one_is_said_in_one_line(run, tmp_path, monkeypatch):
    _, out, _ = run(CONFIG)
    assert "are planned as DeepSpeed" not in out
    (tmp_path / "deepspeed-0.20.1.dist-info").mkdir()
    (tmp_path / "deepspeed-0.20.1.dist-info" / "METADATA").write_text("Name: deepspeed\nVersion: 0.20.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = run(CONFIG, "--json", tmp_path / "plan.json")
    assert code == 0
    (line,) = [line for line in out.splitlines() if "are planned as DeepSpeed" in line]
    assert line.endswith("and 0.20.1 is installed: what ZeRO allocates and sends may differ")
    assert json.loads((tmp_path / "plan.json").read_text())["replay_note"] == line


def test_a_gpu_that_is_too_small_gets_advice(run):
    code, out, _ = run(CONFIG, "--gpu-memory-gib", "0.05")
    assert code == 0
    assert "does not fit" in out
    assert "no train.micro_batch_size fits: set model.recompute=full" in out
    assert "peak, and longer" not in out  # nothing is known of its speed


def test_a_study_is_planned_as_the_run_it_varies(run):
    code, out, _ = run(STUDY, "--attention", "unfused", "--ranks", "1")
    assert code == 0
    assert "unfused attention" in out
    assert "GiB" not in out  # no GPU was named


def test_a_roofline_says_that_it_is_an_estimate_and_at_which_rates(run, tmp_path):
    output = tmp_path / "plan.json"
    options = ("train.precision=bf16", "--gpu", "H100", "--rates", "memory=0.5", "--json", output)
    code, out, _ = run("--roofline", CONFIG, *options)
    assert code == 0
    assert "an estimate, not measured" in out
    assert "memory 0.5, link 0.7 of H100's 989.4 TFLOP/s, 3.35 TB/s and 450 GB/s one way (NVIDIA H100" in out
    roofline = json.loads(output.read_text())["roofline"]
    expected = f"{roofline['tokens_per_second']:,.0f} tokens/s of all ranks, MFU {roofline['mfu_causal']:.1%} with"
    assert f"estimate: {expected} attention counted causally, {roofline['mfu_full']:.1%} in full" in out
    whole = {"name": "in all", "seconds": roofline["seconds"], "bound_by": ""}
    for part in [*roofline["parts"], whole]:
        (row,) = (line for line in out.splitlines() if line.startswith(f"{part['name']}  "))
        assert f"{part['seconds'] * 1e3:,.2f}" in row
        assert part["bound_by"] in row


def test_an_estimate_needs_a_gpu_whose_speed_is_known(run):
    for options in ((), ("--gpu-memory-gib", "80")):
        code, out, err = run("--roofline", CONFIG, "train.precision=bf16", *options)
        assert (code, out) == (2, "")
        assert err == "error: --roofline: must come with --gpu NAME, because no speed is known of a memory alone\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--rates", "speed=1", "--roofline", "--gpu", "H100"],
            "--rates=speed=1: must name one of matmul, attention",
        ),
        (
            ["--roofline", "--gpu", "H100", "train.precision=fp32"],
            "train.precision=fp32: must be bf16 or fp16 with --roofline",
        ),
        (["--gpu", "H1000"], "--gpu=H1000: did you mean H100? It must be one of "),
        (["--ranks", "0"], "--ranks=0: must be at least 1"),
        (["--ranks", "3"], "parallel.tensor_parallel_size=2: must divide the job's 3 ranks"),
        (["--ranks", "-2"], "--ranks=-2: must be at least 1"),
        (
            ["--ranks", "1" + "0" * 30],
            "--ranks=1000000000000000000000000000000: must be at least 1 and fit into 64 bits",
        ),
        (["--gpu-memory-gib", "-1"], "--gpu-memory-gib=-1: must be a finite number above 0"),
        (["--gpu-memory-gib", "0"], "--gpu-memory-gib=0: must be a finite number above 0"),
        (["--gpu-memory-gib", "nan"], "--gpu-memory-gib=nan: must be a finite number above 0"),
        (["--gpu-memory-gib", "inf"], "--gpu-memory-gib=inf: must be a finite number above 0"),
        (["--gpu-memory-gib", "1e300"], "--gpu-memory-gib=1e+300: must be a finite number above 0"),
        (["train.steps=???"], "train.steps=???: must be a value"),
        (["train.steps=" + "7" * 5001], "train.steps=777777"),
        (
            ["zero={stage: !!set {a}}"],
            "override 'zero={stage: !!set {a}}' cannot be read: the tag !!set must be left out",
        ),
        (["--attention", "flash"], "--attention=flash: must be one of fused, unfused"),
        (["zero.stag=1"], "zero.stag is unknown"),
        (["--json", str(ROOT)], f"--json={ROOT}: must be the name of a file, and is a folder"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, message):
    code, out, err = run(CONFIG, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_a_missing_file_is_one_line(run):
    code, _, err = run("no_such.yaml")
    assert code == 2
    assert err.startswith("error: no_such.yaml cannot be read")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12\n", "is not a configuration: it must be a mapping of model, data"),
        ("zero: !!set {a, b}\n", "is not a valid configuration: line 1: the tag !!set must be left out"),
        (
            "study: !!python/object:os.x {}\n",
            "is not a valid configuration: line 1: the tag !!python/object:os.x must be left out",
        ),
        (
            "zero: " + "[" * 2000,
            "is not a valid configuration: values must be nested at most 32 levels deep",
        ),
        ("zero: 1\nzero: 2\n", "is not a valid configuration: line 2: zero stands twice, first in line 1"),
        ("", "is empty: it must be a mapping of model, data"),
    ],
)
def test_a_hostile_file_is_one_line(run, tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    code, out, err = run(tmp_path / "run.yaml")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {tmp_path / 'run.yaml'} {message}")
    assert err.count("\n") == 1


def test_help_has_examples(run):
    code, out, _ = run("--help")
    assert code == 0
    assert f"python {TOOL} configs/gpt_1.3b_alibi_1024.yaml --gpu H100" in out
