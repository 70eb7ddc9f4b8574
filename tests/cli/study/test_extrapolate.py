"""The whole study on a tiny model: interrupted, gone on with, damaged, and asked again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalibi.checkpoint import Checkpoint, find_checkpoint
from megalibi.checkpoint.lock import LOCK_FILE
from megalibi.cli.study import extrapolate
from megalibi.config import config_to_dict
from tests.support.in_process import Runner, make_runner
from tests.support.runs import make_config, write_tokens
from tests.support.warm_python import warm_python

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "extrapolate.py"
METHODS = ("alibi", "sinusoidal")
RATE, SEED = 0.005, 3
STEPS = 120
INTERRUPTED_FROM = 3
TIMEOUT_SECONDS = 240.0
NONOVERLAPPING_TOKENS, SLIDING_TOKENS = 2000, 200


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a study; its runs are in the folder ``runs`` beside it."""
    folder = tmp_path_factory.mktemp("study")
    prefix = write_tokens(folder, num_tokens=20_000)
    base = make_config(
        prefix,
        data={"seq_length": 16, "valid": prefix},
        train={"steps": STEPS, "output_dir": str(folder / "runs"), "eval_samples": 8, "precision": "bf16"},
        checkpoint={"every_steps": 0},
    )
    section = {"methods": list(METHODS), "learning_rates": [RATE], "seeds": [SEED], "lengths": [16, 32], "stride": 4}
    section |= {"nonoverlapping_tokens": NONOVERLAPPING_TOKENS, "sliding_tokens": SLIDING_TOKENS}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"study": section, **config_to_dict(base)}))
    return path


def arguments_of(study: Path, *arguments: str) -> list[str]:
    return [str(study), "--jobs", "2", "--output", str(study.parent / "results"), *arguments]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    """Run the tool in this process, which has its imports; trainings and evaluations are processes as ever."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(sys, "executable", warm_python())  # the interrupted study starts them cold
    return make_runner(extrapolate.COMMAND, TOOL, monkeypatch, capsys)


def folder_of(study: Path, method: str, rate: float = RATE, seed: int = SEED) -> Path:
    return study.parent / "runs" / f"{method}_lr_{rate}_seed_{seed}"


def step_of(study: Path, method: str) -> int:
    metrics = folder_of(study, method) / "metrics.jsonl"
    return metrics.read_text().count('"step_seconds"') if metrics.exists() else 0


def pause(study: Path, method: str) -> int:
    """Stop a training, so that it does not end while another has not begun; return its process."""
    pid = int(json.loads((folder_of(study, method) / LOCK_FILE).read_text())["pid"])
    os.kill(pid, signal.SIGSTOP)
    return pid


def interrupt(study: Path) -> dict[str, int]:
    """Interrupt the study when every training is on its way; return the step that each has saved."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), *arguments_of(study)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    paused: dict[str, int] = {}
    while len(paused) < len(METHODS):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        for method in METHODS:
            if method not in paused and step_of(study, method) >= INTERRUPTED_FROM:
                paused[method] = pause(study, method)
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    for pid in paused.values():
        os.kill(pid, signal.SIGCONT)
    output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 130, output + errors
    assert "error: interrupted" in errors
    return {method: last_step(study, method) for method in METHODS}


def last_checkpoint(study: Path, method: str) -> Path:
    checkpoint = find_checkpoint(folder_of(study, method) / "checkpoints")
    assert checkpoint is not None, method
    return checkpoint


def last_step(study: Path, method: str) -> int:
    return Checkpoint.open(last_checkpoint(study, method)).manifest.step


def contents(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def check_results(results: dict[str, Any]) -> None:
    for protocol, tokens in (("nonoverlapping", NONOVERLAPPING_TOKENS), ("sliding", SLIDING_TOKENS)):
        for method in METHODS:
            rows = results["results"][str(SEED)][protocol][method]
            assert [row["length"] for row in rows] == [16, 32]
            assert all(row["tokens"] == tokens - 1 for row in rows)
            assert all(1.0 < row["perplexity"] < 509.0 for row in rows)  # something was learned
            assert not any("by_position" in row for row in rows)
    for method, by_length in results["by_position"].items():
        plain = {row["length"]: row for row in results["results"][str(SEED)]["nonoverlapping"][method]}
        assert [[(r["first"], r["last"]) for r in by_length[n]][-2:] for n in ("16", "32")] == [
            [(5, 8), (9, 16)],
            [(9, 16), (17, 32)],
        ]
        for length, ranges in by_length.items():
            tokens = [r["tokens"] for r in ranges]
            assert sum(tokens) == NONOVERLAPPING_TOKENS - 1
            mean = sum(r["loss"]["mean"] * n for r, n in zip(ranges, tokens, strict=True)) / sum(tokens)
            assert mean == pytest.approx(plain[int(length)]["loss"], abs=1e-6)
    assert set(results["by_position"]) == set(METHODS)
    for method in METHODS:
        (training,) = results["trainings"][method]
        assert (training["steps"], training["learning_rate"], training["seed"]) == (STEPS, RATE, SEED)
        rates = [{"learning_rate": RATE, "validation_loss": training["validation_loss"]}]
        assert results["sweep"][method] == {"rates": rates, "chosen": RATE, "at_edge": False}
    assert {"command", "commit", "date", "hardware", "versions"} <= set(results)
    assert results["command"].startswith(f"python {TOOL}")


def test_a_study_survives_interruption_and_damage_and_does_nothing_twice(study: Path, run: Runner) -> None:
    saved = interrupt(study)
    assert all(INTERRUPTED_FROM <= step < STEPS for step in saved.values())
    weights = last_checkpoint(study, "sinusoidal") / "weights_tensor_00_data_0000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")

    code, output, errors = run(*arguments_of(study))
    assert code == 0, output + errors
    runs, results = study.parent / "runs", study.parent / "results"
    alibi, sinusoidal = (folder_of(study, method).name for method in METHODS)
    logs = {name: (runs / f"{name}.log").read_text() for name in (alibi, sinusoidal)}
    assert f"resumed from {runs}/{alibi}/checkpoints/step_{saved['alibi']:08d}" in logs[alibi]
    assert weights.parent.with_suffix(".damaged").is_dir()
    assert logs[sinusoidal].count("from the start") == 2  # the only checkpoint was damaged
    assert "resumed" not in logs[sinusoidal]
    assert [last_step(study, method) for method in METHODS] == [STEPS, STEPS]
    check_results(json.loads((results / "results.json").read_text()))
    assert "| 32 (2 x) |" in (results / "table.md").read_text()
    for name in ("figure.png", "figure_by_position.png"):
        assert (results / name).read_bytes().startswith(b"\x89PNG")

    before = contents(runs)
    code, output, errors = run(*arguments_of(study))
    assert code == 0, output + errors
    assert f"trained already: {alibi}, {sinusoidal}" in output
    assert "6 of 6 evaluations known already" in output
    assert "started" not in output
    assert contents(runs) == before

    # Another question: the models stay, and what is asked anew is scored anew, and alone.
    wider = ["study.methods=[alibi]", "study.lengths=[16,48]", "study.interpolate_slopes=true"]
    code, output, errors = run(*arguments_of(study, *wider))
    assert code == 0, output + errors
    assert sorted(line.split(":")[0] for line in output.splitlines() if ": started" in line) == [
        f"{alibi} interpolated nonoverlapping 16,48",
        f"{alibi} interpolated sliding 16",
        f"{alibi} interpolated sliding 48",
        f"{alibi} nonoverlapping 16,48",
        f"{alibi} sliding 48",
    ]
    page = (results / "table.md").read_text()
    assert "| 48 (3 x) |" in page
    assert "| 32 (2 x) |" not in page
    check_interpolated(json.loads((results / "results.json").read_text()))


def check_interpolated(results: dict[str, Any]) -> None:
    """At the training length nothing is scaled; beyond it the same models are others."""
    for protocol in ("nonoverlapping", "sliding"):
        curves = results["results"][str(SEED)][protocol]
        plain, scaled = (curves[name] for name in ("alibi", "alibi_interpolated"))
        assert [row["slope_scale"] for row in scaled] == [1.0, 16 / 48]
        assert scaled[0]["loss"] == plain[0]["loss"]
        assert scaled[1]["loss"] != plain[1]["loss"]
    assert set(results["trainings"]) == {"alibi"}
    assert list(results["by_position"]["alibi_interpolated"]) == ["16", "48"]


def test_a_wider_study_trains_what_is_new_alone_and_takes_the_best_rate_to_every_seed(study: Path, run: Runner) -> None:
    """Rates that learn nothing or diverge are tried at the first seed, and at no other; what stands already is used."""
    wider = ["study.methods=[alibi]", f"study.learning_rates=[1.0e-6,{RATE},1.0e+30]", f"study.seeds=[{SEED},4]"]
    code, output, errors = run(*arguments_of(study, *wider, "study.lengths=[16]"))
    assert code == 0, output + errors
    runs = [folder_of(study, "alibi", *at).name for at in ((1e-6, SEED), (1e30, SEED), (RATE, 4))]
    assert [
        line.split(":")[0] for line in output.splitlines() if ": started" in line and " " not in line.split(":")[0]
    ] == runs
    assert f"alibi: learning rate {RATE}; validation loss " in output
    assert ", diverged with 1e+30" in output

    results = json.loads((study.parent / "results" / "results.json").read_text())
    losses = [row["validation_loss"] for row in results["sweep"]["alibi"]["rates"]]
    assert losses[1] < losses[0] - 0.1
    assert losses[2] is None
    assert results["trainings"]["alibi"][2]["diverged_at_step"] < STEPS
    assert (results["sweep"]["alibi"]["chosen"], results["sweep"]["alibi"]["at_edge"]) == (RATE, False)
    perplexities = [
        [row["perplexity"] for row in results["results"][str(seed)]["nonoverlapping"]["alibi"]] for seed in (SEED, 4)
    ]
    assert perplexities[0] != perplexities[1]
    page = (study.parent / "results" / "table.md").read_text()
    for values in zip(*perplexities, strict=True):
        assert f"{sum(values) / 2:.2f} ({min(values):.2f} to {max(values):.2f})" in page


BAD_INPUT = {
    "method": ("study.methods=[alibi,rope]", "study.methods=rope: must be some of "),
    "unknown key": ("study.strid=3", "study.strid is unknown: did you mean study.stride?"),
    "training length": (
        "data.seq_length=20",
        "study.lengths=[16, 32]: must begin with the training length, data.seq_length=20",
    ),
    "batch": ("train.global_batch_size=5", "train.global_batch_size=5: must be a multiple of"),
    "jobs": ("--jobs=0", "error: --jobs=0: must be at least 1"),
    "launcher": ("--launcher=srun '", "--launcher=srun ': must be a command (No closing quotation)"),
    "output": (f"--output={TOOL}", f"--output={TOOL} cannot be written: {TOOL} is no folder"),
    "output below a file": (f"--output={TOOL}/a/b", f"--output={TOOL}/a/b cannot be written: {TOOL} is no folder"),
    "text": ("data.train=/nowhere/tokens", "/nowhere/tokens.idx: no such token file"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(study: Path, run: Runner, case: str) -> None:
    argument, message = BAD_INPUT[case]
    code, _, errors = run(*arguments_of(study, argument, f"train.output_dir={study.parent / 'none'}"))
    assert code == 2
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (study.parent / "none").exists()


def test_a_result_that_cannot_be_written_is_said_before_the_work(study: Path, run: Runner, tmp_path: Path) -> None:
    for name in ("results.json", "table.md", "figure.png", "figure_by_position.png"):
        (tmp_path / name).mkdir()
        target = f"train.output_dir={tmp_path / 'none'}"
        code, _, errors = run(*arguments_of(study, f"--output={tmp_path}", target))
        (tmp_path / name).rmdir()
        assert code == 2
        reason = f"{tmp_path / name} must be a file, and is a folder"
        assert errors == f"error: --output={tmp_path} cannot be written: {reason}\n"
        assert not list(tmp_path.iterdir())


def test_help_has_an_example(run: Runner) -> None:
    code, output, _ = run("--help")
    assert code == 0
    assert f"python {TOOL} configs/extrapolation_small.yaml --jobs 2" in output
