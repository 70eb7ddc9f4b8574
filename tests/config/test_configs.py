"""Every file in configs/ is a run, or a study of runs, that can start on the hardware its header names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megalibi.config import Config, Derived, derive, load_config
from megalibi.model import count_parameters
from megalibi.studies.comparison.study import CompareStudy
from megalibi.studies.extrapolation.study import ExtrapolationStudy
from megalibi.studies.study import load_study

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
STUDIES = {path: CompareStudy for path in CONFIGS if path.stem.startswith("compare_")} | {
    path: ExtrapolationStudy for path in CONFIGS if path.stem.startswith("extrapolation_")
}
RUNS = [path for path in CONFIGS if path not in STUDIES]


def header_of(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    return "\n".join(header)


def read_number(text: str) -> int:
    return int(text.replace(",", ""))


def load(path: Path) -> Config:
    return load_study(path, (), STUDIES[path])[1] if path in STUDIES else load_config(path)


def stated_ranks(path: Path) -> int:
    ranks = re.search(r"^# Hardware: (\d+) ranks? on ", header_of(path), re.MULTILINE)
    assert ranks, f"{path}: the header does not say '# Hardware: N ranks on ...'"
    return int(ranks[1])


def derive_as_stated(path: Path) -> Derived:
    return derive(load(path), stated_ranks(path))


def test_there_are_the_configs_that_are_promised() -> None:
    names = [path.stem for path in CONFIGS]
    assert "quickstart" in names
    for size in ("125m", "350m", "1.3b"):
        assert [name for name in names if size in name], size


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_header_of_a_study_states_the_ranks_of_its_runs(path: Path) -> None:
    study, _ = load_study(path, (), STUDIES[path])
    assert study.ranks == stated_ranks(path)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_header_states_hardware_as_configured(path: Path) -> None:
    config, derived, header = load_config(path), derive_as_stated(path), header_of(path)
    hardware = re.search(r"^# Hardware: .*\((.*)\)", header, re.MULTILINE)
    assert hardware, f"{path}: the header does not say how the ranks are used"
    stated = dict(part.strip().rsplit(" ", 1) for part in hardware[1].split(","))
    assert int(stated.pop("ZeRO")) == config.zero.stage
    assert int(stated.pop("tensor parallel", 1)) == config.parallel.tensor_parallel_size
    assert int(stated.pop("data parallel", 1)) == derived.data_parallel_size
    assert not stated


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_states_tokens_per_step(path: Path) -> None:
    config, derived, header = load(path), derive_as_stated(path), header_of(path)
    tokens = re.search(r"^# Tokens per step: ([\d,]+) x ([\d,]+) = ([\d,]+)\.", header, re.MULTILINE)
    assert tokens, f"{path}: the header does not say '# Tokens per step: samples x tokens = product.'"
    assert [read_number(text) for text in tokens.groups()] == [
        config.train.global_batch_size,
        config.data.seq_length,
        derived.batch_tokens,
    ]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_header_states_memory(path: Path) -> None:
    assert re.search(r"\d GB of .*(memory|weights)", header_of(path)), (
        f"{path}: the header does not say how much memory"
    )


def stated_parameters(path: Path) -> float | None:
    number = re.search(r"([\d.]+) ([MB])-parameter", header_of(path))
    return float(number[1]) * {"M": 1e6, "B": 1e9}[number[2]] if number else None


@pytest.mark.parametrize("path", [path for path in CONFIGS if stated_parameters(path)], ids=lambda path: path.stem)
def test_parameters_are_as_many_as_stated(path: Path) -> None:
    assert count_parameters(load(path).model) == pytest.approx(stated_parameters(path), rel=0.05)


def test_the_papers_models_are_those_of_the_paper() -> None:
    paths = [path for path in CONFIGS if "1.3b" in path.stem]
    assert len(paths) >= 2
    for path in paths:
        model = load(path).model
        sizes = (model.num_layers, model.hidden_size, model.num_attention_heads, model.ffn_hidden_size)
        assert sizes == (25, 2048, 16, 8192)
        assert count_parameters(model) == pytest.approx(1.3e9, rel=0.05)
