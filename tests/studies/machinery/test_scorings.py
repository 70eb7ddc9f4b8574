from __future__ import annotations

import dataclasses
import json
import os
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from megalibi.errors import JobError
from megalibi.evaluate.result import read_evaluation
from megalibi.studies.machinery.machine import Machine
from megalibi.studies.machinery.scorings import Scoring, run_scorings
from tests.support.jobs import run_job, write_job

TOKENS = 400


@pytest.fixture(scope="module")
def scoring(tmp_path_factory: pytest.TempPathFactory) -> Scoring:
    """A finished run, scored at two lengths."""
    folder = tmp_path_factory.mktemp("scores")
    run_job(write_job(folder))
    scoring = Scoring(
        label="run",
        checkpoint=folder / "run" / "checkpoints" / "step_00000006",
        data=str(folder / "tokens"),
        protocol="sliding",
        stride=8,
        tokens=TOKENS,
        lengths=(16, 32),
        output=folder / "run" / "evaluation_sliding.json",
        machine=Machine(
            environment=os.environ | {"OMP_NUM_THREADS": "1"},
            cores=1,
        ),
    )
    assert not scoring.is_finished()
    run_scorings([scoring], Console(quiet=True))
    return scoring


def test_the_output_is_an_evaluation_and_nothing_else_is_left(scoring: Scoring) -> None:
    evaluation = read_evaluation(scoring.output)
    assert [(row.length, row.tokens) for row in evaluation.results] == [(16, TOKENS - 1), (32, TOKENS - 1)]
    assert (evaluation.protocol, evaluation.stride, evaluation.step) == ("sliding", 8, 6)
    assert [path.name for path in scoring.output.parent.glob("evaluation*")] == ["evaluation_sliding.json"]


def test_the_command_asks_for_what_is_set_alone(scoring: Scoring) -> None:
    plain = scoring.command(0)
    assert not {"--slope-scale", "--by-position"} & set(plain)
    asked = dataclasses.replace(scoring, slope_scale="interpolate", by_position=True).command(0)
    assert [word for word in asked if word not in plain] == ["--slope-scale", "interpolate", "--by-position"]


def test_a_file_from_before_slopes_could_be_scaled_answers_the_same_question(scoring: Scoring) -> None:
    asked = {"data": scoring.data, "protocol": "sliding", "stride": 8, "tokens": TOKENS}
    assert json.loads(scoring.output.read_text())["question"] == asked


def test_what_is_known_is_not_scored_again(scoring: Scoring) -> None:
    before, shown = scoring.output.stat().st_mtime_ns, StringIO()
    alone = dataclasses.replace(scoring, lengths=(32,))
    run_scorings([scoring, alone], Console(file=shown))
    assert "2 of 2 evaluations known already" in shown.getvalue()
    assert scoring.output.stat().st_mtime_ns == before


def test_another_question_or_model_is_not_answered_by_it(scoring: Scoring, tmp_path: Path) -> None:
    assert scoring.is_finished()
    for change in ({"lengths": (16, 33)}, {"stride": 4}, {"tokens": 399}, {"data": "other"}, {"protocol": "other"}):
        assert not dataclasses.replace(scoring, **change).is_finished()  # type: ignore[arg-type]
    assert not dataclasses.replace(scoring, slope_scale="interpolate").is_finished()
    assert not dataclasses.replace(scoring, by_position=True).is_finished()  # it has no losses by position
    (tmp_path / "manifest.sha256").write_text("of another checkpoint")
    assert not dataclasses.replace(scoring, checkpoint=tmp_path).is_finished()


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"results": []})])
def test_an_output_that_cannot_be_read_is_scored_anew(scoring: Scoring, tmp_path: Path, content: str) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    assert not dataclasses.replace(scoring, output=tmp_path / "evaluation.json").is_finished()


def test_a_failure_is_said_in_one_line(scoring: Scoring, tmp_path: Path) -> None:
    failing = dataclasses.replace(scoring, data="/nowhere/text", output=tmp_path / "evaluation.json")
    with pytest.raises(JobError, match=r"run sliding 16,32 failed with exit code 2: /nowhere/text\.idx: no such"):
        run_scorings([failing], Console(quiet=True))
    assert not failing.output.exists()
