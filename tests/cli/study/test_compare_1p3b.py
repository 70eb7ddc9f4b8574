"""The whole comparison at scale smoke, on a tiny model and a text of its own; and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megalibi.cli.command import spell_script
from megalibi.cli.study import compare_1p3b
from megalibi.metrics.provenance import hash_code
from tests.support.in_process import Runner, make_runner
from tests.support.runs import VOCAB_SIZE, write_tokens
from tests.support.warm_python import warm_python

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "compare_1p3b.py"
STEPS = 4
LENGTHS = (16, 32)
VALID_TOKENS = 600
PLAN_BOUND = 0.03
"""What a plan promises: its bytes are within this of the tensors' true ones."""
MODELS = {f"{method}_{length}" for method in ("alibi", "sinusoidal") for length in LENGTHS}
VARIANTS = {f"{model}_{attention}" for model in MODELS for attention in ("unfused", "fast")}
TINY = [
    f"study.lengths={list(LENGTHS)}",
    "study.turns=1",
    "study.steps_per_turn=2",
    f"study.valid_tokens={VALID_TOKENS}",
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    f"model.vocab_size={VOCAB_SIZE}",
    "data.tokenizer=null",
    f"data.seq_length={LENGTHS[-1]}",
    f"train.steps={STEPS}",
    "train.eval_samples=4",
    f"checkpoint.every_steps={STEPS // 2}",
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    """Run the tool in this process, which has its imports; turns, trainings and evaluations are processes as ever."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return make_runner(compare_1p3b.COMMAND, TOOL, monkeypatch, capsys)


@pytest.fixture
def python() -> str:
    return warm_python()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    write_tokens(folder, num_tokens=20_000)
    return folder


def arguments_of(folder: Path, *more: str) -> list[str]:
    text = ["--data", str(folder / "tokens"), "--valid", str(folder / "tokens")]
    where = ["--output", str(folder / "results"), f"train.output_dir={folder / 'runs'}"]
    return ["--scale", "smoke", *text, *where, *TINY, *more]


def contents(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def check_results(results: dict[str, Any]) -> None:
    assert set(results["speed"]) == set(results["planned_memory_bytes"]) == VARIANTS
    for name, speed in results["speed"].items():
        seconds = speed["step_seconds"]
        assert 0.0 < seconds["low"] <= seconds["median"] <= seconds["high"]
        assert speed["allocator_peak_bytes"] == sum(speed["memory_bytes"].values())
        planned = sum(results["planned_memory_bytes"][name].values())
        assert planned == pytest.approx(speed["allocator_peak_bytes"], rel=PLAN_BOUND)
        assert speed["device_peak_bytes"] > speed["allocator_peak_bytes"]
        assert (speed["turns"], speed["turn_spread"], speed["turns_replaced"]) == ([1], None, 0)
        assert speed["disturbance"] == "too few turns (1, not 3)"
        (conditions,) = speed["turn_conditions"]
        assert 0.0 <= conditions["step_spread"] < 10.0
        assert min(conditions["load_before"], conditions["load_after"]) >= 0.0
        (commit,) = speed["commits"]
        assert len(commit) >= 7
        assert not commit.endswith("-dirty")
    assert {speed["code"] for speed in results["speed"].values()} == {hash_code()}
    about_speed = [f for f in results["findings"] if "updates an hour" in f["expected"]]
    assert [f["holds"] for f in about_speed] == [None, None]
    assert set(results["quality"]) == MODELS
    by_updates = {name: quality["perplexity_by_updates_and_length"] for name, quality in results["quality"].items()}
    last = {name: by_length[str(STEPS)] for name, by_length in by_updates.items()}
    assert set(last["alibi_16"]) == {"16", "32", "64", "128"}
    assert set(last["sinusoidal_16"]) == {"16", "32"}
    assert set(last["sinusoidal_32"]) == {"32"}
    assert all(1.0 < perplexity < VOCAB_SIZE for lengths in last.values() for perplexity in lengths.values())
    for pair in results["pairs"]:
        assert (pair["alibi"], pair["sinusoidal"]) == ("alibi_16", "sinusoidal_32")
        assert [[point["updates"] for point in curve] for curve in pair["curves"]] == [[2, 4], [2, 4]]
    assert {"command", "commit", "date", "hardware", "versions", "config", "shapes"} <= set(results)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its turns and the plan are a CPU's")
def test_smoke_from_nothing_to_the_report_and_again(
    folder: Path, python: str, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", python)
    arguments = arguments_of(folder)
    code, output, errors = run(*arguments, "--part", "speed")
    assert code == 0, errors
    results = json.loads((folder / "results" / "results.json").read_text())
    assert (set(results["speed"]), results["quality"]) == (VARIANTS, {})

    # A turn that was interrupted is measured again, the others are not.
    turn = folder / "runs" / "speed" / "alibi_32_fast" / "turn_1.json"
    turn.unlink()
    before = contents(folder / "runs")
    code, output, errors = run(*arguments)
    assert code == 0, errors
    assert f"{len(VARIANTS) - 1} of {len(VARIANTS)} turns measured already" in output
    after = contents(folder / "runs")
    measured = [name for name in before if name.endswith(".json")]
    assert all(before[name] == after[name] for name in measured)
    assert turn.is_file()
    check_results(json.loads((folder / "results" / "results.json").read_text()))
    assert (folder / "results" / "figure5.png").read_bytes().startswith(b"\x89PNG")
    assert "in the paper:" in output
    assert "load average of the last minute: " in output
    assert f"too few turns: {len(VARIANTS)} of {len(VARIANTS)} speeds have fewer than 3\n" in output
    again = "( and turn 1 of every model again)?: python .*--part speed( --again 1)?"  # where other work was seen
    assert re.search(rf"measures the turns that are missing{again} study.turns=3\n", output)

    trained = contents(folder / "runs")
    page = (folder / "results" / "report.md").read_text()
    code, output, errors = run(*arguments)
    assert code == 0, errors
    assert contents(folder / "runs") == trained  # nothing was done twice
    assert (folder / "results" / "report.md").read_text() == page

    code, output, errors = run(*arguments, "model.activation=relu")
    assert code == 2
    assert "was measured with another configuration" in errors
    assert "model.activation=relu, not gelu" in errors

    record = json.loads(turn.read_text())
    turn.write_text(json.dumps({**record, "code": "another"}))
    shutil.rmtree(folder / "runs" / "alibi_16")
    code, output, errors = run(*arguments, "--part", "quality")
    assert code == 2
    assert "and turns of different code cannot be compared" in errors
    assert not (folder / "runs" / "alibi_16").exists()  # nothing was trained before


BAD_INPUT = {
    "study key": (["study.turn=3"], "study.turn is unknown: did you mean study.turns?"),
    "length": (["study.lengths=[16,24]"], "it must be a multiple of the 24 of study.lengths"),
    "falling": (["study.lengths=[32,16]"], "study.lengths=[32, 16]: must be two or more rising lengths above 0"),
    "tokens": (["study.valid_tokens=128"], "study.valid_tokens=128: must be more than 128"),
    "keep": (["checkpoint.keep=2"], "checkpoint.keep=2"),
    "text": (["data.train=none"], "none.idx: no such token file"),
    "launcher": (["--launcher", "srun '"], "--launcher=srun ': must be a command (No closing quotation)"),
    "output": (["--output", str(TOOL)], f"--output={TOOL} cannot be written: {TOOL} is no folder"),
    "output below a file": (["--output", f"{TOOL}/a"], f"--output={TOOL}/a cannot be written: {TOOL} is no folder"),
    "again": (["--again", "2"], "--again=2: must be the number of a turn, from 1 to study.turns=1"),
    "again without turns": (["--again", "1", "--part", "quality"], "--again: measures turns of part one again"),
    "two texts": (["data.valid=[a,b]"], "data.valid: must be one token file to evaluate on, not 2"),
}


@pytest.mark.parametrize(("more", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line(folder: Path, run: Runner, more: list[str], message: str) -> None:
    code, _, errors = run(*arguments_of(folder, f"train.output_dir={folder / 'refused'}", *more))
    assert (code, len(errors.splitlines())) == (2, 1)
    assert message in errors
    assert not (folder / "refused").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("scale", ["1.3b", "1.3b_10min"])
def test_large_scale_without_a_gpu_says_what_it_needs(tmp_path: Path, run: Runner, scale: str) -> None:
    code, _, errors = run("--scale", scale, "--output", str(tmp_path), "model.num_layers=1")
    assert code == 2
    needs = r"must have a GPU with room for \d+\.\d GiB, and there is none; --plan computes .*\n"
    assert re.fullmatch(f"error: --scale={scale}: {needs}", errors)


def test_plan_reads_nothing_that_was_measured(folder: Path, tmp_path: Path, run: Runner) -> None:
    turn = tmp_path / "speed" / "alibi_16_fast" / "turn_1.json"
    turn.parent.mkdir(parents=True)
    turn.write_text("no JSON")
    where = ["--output", str(tmp_path / "plan"), f"train.output_dir={tmp_path}"]
    code, _, errors = run(*arguments_of(folder, "--plan", *where))
    assert code == 0, errors
    results = json.loads((tmp_path / "plan" / "results.json").read_text())
    assert (results["speed"], results["quality"]) == ({}, {})
    page = (tmp_path / "plan" / "report.md").read_text()
    assert "nothing was run" in page
    assert f"its {len(MODELS)} trainings: {len(MODELS)} x 2 x " in page


def test_plan_does_not_write_where_results_are() -> None:
    folders = {}
    for more in ([], ["--plan"], ["--plan", "--output", "here"]):
        arguments = compare_1p3b.COMMAND.parse(["--scale", "small", *more], spell_script(str(TOOL)))
        output = compare_1p3b.find_output(arguments)
        folders[len(more)] = str(output.relative_to(ROOT if len(more) < 3 else "."))
    assert folders == {0: "results/compare_small", 1: "results/compare_small_plan", 3: "here"}


def test_plan_of_the_large_scale(tmp_path: Path, run: Runner) -> None:
    code, _, errors = run("--scale", "1.3b", "--plan", "--output", str(tmp_path), "study.lengths=[1024,2048]")
    assert code == 0, errors
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["shapes"]["embedding.weight"] == [50304, 2048]
    assert results["shapes"]["blocks.24.mlp.up.weight"] == [8192, 2048]
    assert (results["speed"], results["quality"], results["findings"]) == ({}, {}, [])
    saving = {pair["attention"]: pair["planned_memory_saving"] for pair in results["pairs"]}
    assert saving["unfused"] == pytest.approx(0.19, abs=0.03)  # the paper's is 10.6%, of other micro batches
    assert saving["fast"] == pytest.approx(0.0, abs=0.001)
    page = (tmp_path / "report.md").read_text()
    assert "Nothing is measured yet." in page
    assert "and 16,384 in a micro batch (4,096 with unfused attention, which holds its scores)" in page
    assert "its 4 trainings: 4 x 50 x 19" in page  # 2 lengths
    assert not (tmp_path / "figure5.png").exists()
