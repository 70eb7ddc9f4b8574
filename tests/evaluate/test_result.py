from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megalibi.errors import CheckpointError
from megalibi.evaluate.result import Evaluation, EvaluationResult, read_evaluation, write_evaluation

RESULTS = Path(__file__).parents[2] / "results"
WRITTEN_BEFORE = sorted([*RESULTS.rglob("evaluation*.json"), *RESULTS.rglob("*_by_position.json")])
RESULT = EvaluationResult(length=8, loss=1.0, perplexity=2.718, tokens=64)


def make_evaluation(**changes: Any) -> Evaluation:
    fields: dict[str, Any] = {
        "step": 1,
        "train_seq_length": 8,
        "protocol": "sliding",
        "stride": 4,
        "results": (RESULT,),
    }
    return Evaluation(**(fields | changes))


def without_absent(fields: dict[str, Any]) -> dict[str, Any]:
    results = [{name: value for name, value in row.items() if value is not None} for row in fields["results"]]
    return {name: value for name, value in fields.items() if value not in (None, "", {})} | {"results": results}


@pytest.mark.parametrize("path", WRITTEN_BEFORE, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_files_of_earlier_versions_are_read_and_nothing_of_them_is_lost(path: Path, tmp_path: Path) -> None:
    evaluation = read_evaluation(path)
    fields = json.loads(path.read_text())
    assert evaluation.name == path.stem
    assert without_absent(evaluation.to_dict()) == without_absent(fields)
    write_evaluation(evaluation, tmp_path / "again.json")
    assert read_evaluation(tmp_path / "again.json") == evaluation
    assert evaluation.results[0].loss == fields["results"][0]["loss"]


def test_there_are_files_of_earlier_versions() -> None:
    assert len(WRITTEN_BEFORE) >= 3
    assert any(read_evaluation(path).results[0].by_position for path in WRITTEN_BEFORE)


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    positions = {"seen": [1.0, 2.0], "loss": [3.5, 3.25], "tokens": [32.0, 32.0]}
    long = dataclasses.replace(
        RESULT,
        length=16,
        bits_per_byte=0.5,
        tokens_per_second=9.5,
        memory_bytes=7,
        slope_scale=0.5,
        by_position=positions,
    )
    evaluation = make_evaluation(
        checkpoint="runs/a/checkpoints/step_00000001", data="text", results=(RESULT, long), device="cpu", ranks=2,
        tensor_parallel_size=1, command="python tools/evaluate.py", commit="0123456789ab", date="2026-11-26T16:00:00",
        hardware={"cores": 2}, versions={"torch": "2.13.0"}, question={"tokens": 64, "stride": 4}, model="abc",
    )  # fmt: skip
    write_evaluation(evaluation, tmp_path / "evaluation.json")
    assert read_evaluation(tmp_path / "evaluation.json") == evaluation
    assert list(tmp_path.iterdir()) == [tmp_path / "evaluation.json"]


def test_what_only_some_files_have_is_left_out_and_what_is_not_known_is_null(tmp_path: Path) -> None:
    write_evaluation(make_evaluation(stride=None), tmp_path / "evaluation.json")
    fields = json.loads((tmp_path / "evaluation.json").read_text())
    assert fields.keys().isdisjoint({"question", "model", "name"})
    assert fields["stride"] is None
    assert fields["results"][0]["bits_per_byte"] is None
    assert fields["results"][0].keys().isdisjoint({"slope_scale", "by_position"})


def test_results_are_in_rising_order_whatever_the_file_has(tmp_path: Path) -> None:
    long = dataclasses.replace(RESULT, length=16)
    write_evaluation(make_evaluation(results=(long, RESULT)), tmp_path / "evaluation.json")
    assert read_evaluation(tmp_path / "evaluation.json").results == (RESULT, long)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"step": "1"}, r"step='1': must be of type int"),
        ({"results": [{"length": 8}]}, r"the field loss is missing"),
        ({"results": 3}, r"not iterable"),
        ({"results": [3]}, r"not iterable"),
        ({"stride": 1.5}, r"stride=1\.5: must be of type int \| None"),
    ],
)
def test_what_is_no_evaluation_is_said(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(make_evaluation().to_dict() | changes))
    with pytest.raises(CheckpointError, match=rf"evaluation\.json: not an evaluation file \(.*{reason}"):
        read_evaluation(path)


def test_an_evaluation_may_lack_what_its_machine_could_not_measure(tmp_path: Path) -> None:
    path = tmp_path / "evaluation-long.json"
    path.write_text(
        '{"step": 1, "train_seq_length": 8, "protocol": "sliding", "stride": 4,'
        ' "results": [{"length": 8, "loss": 1.0, "perplexity": 2.718, "tokens": 64}]}'
    )
    evaluation = read_evaluation(path)
    assert (evaluation.name, evaluation.stride) == ("evaluation-long", 4)
    assert evaluation.results[0].memory_bytes is None
