"""The page from what an H200 measured, and from nothing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megalibi.config import config_from_dict, derive
from megalibi.measure.step_profile import Slice, count_work, summarize_profile
from megalibi.studies.gpu_visit.report import format_visit
from megalibi.studies.gpu_visit.results import VisitResults, read_visit_results
from megalibi.studies.gpu_visit.step import DONE, FAILED, OUT_OF_TIME, StepOutcome

RECORDED = Path(__file__).parents[3] / "results" / "gpu_h200_first"


def read(name: str) -> dict[str, Any]:
    return json.loads((RECORDED / f"{name}.json").read_text())


def recorded_profile() -> dict[str, Any]:
    """The step that was profiled there: two micro batches, by names of kernels alone."""
    old, config = read("profile"), config_from_dict(read("train_alibi_2048")["config"])
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_size=16))
    slices = [
        Slice(kernel["name"], kernel["milliseconds"] / 1e3 / kernel["calls"], ())
        for kernel in old["kernels"]
        for _ in range(kernel["calls"])
    ]
    profile = summarize_profile(slices, old["span_milliseconds"] / 1e3, old["busy_milliseconds"] / 1e3)
    work = count_work(config, derive(config, 1))
    return {**profile, "work": {part: dataclasses.asdict(of_part) for part, of_part in work.items()}}


def recorded_ceilings() -> dict[str, dict[str, Any]]:
    old = read("measured")["ceilings"]
    matmul, copy = old["8192^3 TFLOP/s"], old["copy TB/s, read and written"]
    return {
        "matmul bf16": {"median": matmul, "low": matmul, "high": matmul, "unit": "TFLOP/s", "shape": [8192] * 3},
        "copy": {"median": copy, "low": copy, "high": copy, "unit": "TB/s", "shape": [1 << 31]},
    }


def recorded_as_cuda_graph() -> dict[str, Any]:
    """The rows of batch 1 as if --cuda-graph had been given."""
    record = read("attention_b1")
    return {**record, "settings": {**record["settings"], "cuda_graph": True}}


@pytest.fixture(scope="module")
def page() -> str:
    outcomes = [
        StepOutcome(name="ceilings", what="the best", status=DONE, seconds=5.1),
        StepOutcome(name="contract", what="exactness", status=FAILED, seconds=27.0, said="exit code 1: flash refuses"),
        StepOutcome(name="resume", what="resume", status=OUT_OF_TIME, seconds=60.0, said="killed after 60 s"),
    ]
    found = VisitResults(
        facts={"hardware": {"gpu": "NVIDIA H200", "driver": "580.159.04"}, "commit": "ea2be1c9e74b"},
        outcomes=outcomes,
        ceilings=recorded_ceilings(),
        profile=recorded_profile(),
        turns={"train_alibi": read("train_alibi_2048"), "train_alibi_long": read("train_alibi_8192")},
        attention={"attention_batch_1": read("attention_b1"), "attention_batch_8": read("attention_b8")}
        | {"attention_cuda_graph": recorded_as_cuda_graph()},
        resume={"equal": False},
    )
    return format_visit(found)


def cells(page: str, first: str) -> list[str]:
    """The cells of the row that begins with a name."""
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in row.split("|")[2:-1]]


def test_failures_stand_first(page: str) -> None:
    sections = [line for line in page.splitlines() if line.startswith("#")]
    assert sections[:3] == [
        "# What NVIDIA H200 gives",
        "## What failed or was not done",
        "## What bounds each part of a step",
    ]
    assert "- **contract** failed: exit code 1: flash refuses" in page
    assert "- **resume** out of time: killed after 60 s" in page
    assert "- **resume** the resumed training is not the uninterrupted one" in page
    assert "**ceilings**" not in page


def test_each_part_has_its_time_its_work_and_its_bound(page: str) -> None:
    # 6 x 32,768 tokens x (25 x 12 x 2,048^2 + 50,304 x 2,048) elements = 267.6 TFLOP: 335.0 ms at 799.04 TFLOP/s.
    assert cells(page, "matmul") == ["347.16", "61.4%", "268", "188", "334.96", "96%", "matrix products"]
    milliseconds, share, flops, moved, least, of_ceiling, bound = cells(page, "attention")
    assert (milliseconds, share, bound) == ("74.46", "13.2%", "matrix products")
    # 7 products of 2 x 25 layers x 2048 wide x 1024.5 keys x 32,768 tokens.
    assert float(flops) == pytest.approx(24.06, abs=0.05)
    assert float(moved) == pytest.approx(25 * 32768 * (12 * 2048 * 2 + 2 * 4 * 16) / 1e9, abs=0.1)
    assert float(least) == pytest.approx(24.06 / 799.04 * 1e3, abs=0.05)
    assert of_ceiling == "40%"
    assert cells(page, "layer norm")[0] == "21.67"
    assert cells(page, "layer norm")[-1] == "memory"
    assert cells(page, "GELU")[:2] == ["22.75", "4.0%"]
    # 5 x 32,768 x 8,192 x 2 bytes x 25 layers at 4.27 TB/s.
    assert float(cells(page, "GELU")[4]) == pytest.approx(67.1 / 4.2665, abs=0.01)
    assert cells(page, "gaps: the device waits for the host")[:2] == ["9.33", "1.7%"]


def test_training_rates_are_those_of_the_readme(page: str) -> None:
    name, tokens, rates, teraflops, of_sheet, of_matmul, memory = cells(page, "train_alibi: alibi")
    assert (name, tokens, memory) == ("1.4B", "8 x 2,048 x 4", "60.4 GB")
    assert rates == "58,063 (57,962 to 58,418)"
    assert of_sheet == "51.6%"
    assert float(teraflops) == pytest.approx(0.516 * 989.4, abs=1.0)
    assert float(of_matmul.rstrip("%")) == pytest.approx(51.6 * 989.4 / 799.04, abs=0.1)
    assert cells(page, "train_alibi_long: alibi")[4] == "59.2%"


def test_attention_stands_beside_its_peers(page: str) -> None:
    lines = [line for line in page.splitlines() if line.startswith("| triton |")]
    assert lines[0] == "| triton | 0.27 | 0.27 | 0.44 | 1.10 | 2.69 |"
    assert lines[1] == "| triton | 0.51 | 1.40 |"
    assert "| flash_attn_alibi | 0.28 | 0.38 | 1.07 | 3.55 | 12.73 |" in page
    assert "flash_attn_alibi: flash_attn_func, alibi_slopes." in page
    heads = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| milliseconds")]
    assert heads == ["| milliseconds, batch 1", "| milliseconds, batch 8", "| milliseconds, batch 1, CUDA graph"]


def test_it_says_that_a_trained_models_attention_takes_another_time(page: str) -> None:
    assert "depends on q and k, so a trained model takes another time" in page
    assert "On random q and k; the horizon of ours" in page


def test_a_visit_that_has_found_nothing_has_a_page(tmp_path: Path) -> None:
    outcome = StepOutcome(name="machine", what="driver", status=FAILED, said="exit code 1")
    page = format_visit(read_visit_results(tmp_path, {"hardware": {"gpu": "NVIDIA H200"}}, [outcome]))
    assert "- **machine** failed: exit code 1" in page
    assert "| machine | driver | failed | 0.0 |" in page
    assert "## Training" not in page


def test_failed_tests_are_named(tmp_path: Path) -> None:
    code = "import pytest\n@pytest.fixture\ndef bad(): 1 / 0\ndef test_a(): assert 1 == 2\ndef test_b(bad): pass\n"
    (tmp_path / "test_it.py").write_text(f"{code}def test_c(): pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml", "test_gpu.xml", "test_it.py"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1
    page = format_visit(read_visit_results(tmp_path, {}, []))
    lines = [line for line in page.splitlines() if line.startswith("- ")]
    assert lines == [
        "- `test_it::test_a`: assert 1 == 2",
        '- `test_it::test_b`: failed on setup with "ZeroDivisionError: division by zero"',
    ]
