from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from megalibi.errors import ConfigError
from megalibi.studies.comparison.measured_code import Code
from megalibi.studies.comparison.speed import read_speeds
from megalibi.studies.comparison.turns import order_turns, select_turns
from megalibi.studies.machinery.machine import COMMAND_SCRIPT
from tests.support.turns import FAST, SLOW, STUDY, make_turns, write_turn

CODE, CHANGED = Code(commit="abc", sha256="1"), Code(commit="abc", sha256="2")


def test_a_round_has_every_model_with_every_kind_of_attention_and_every_other_one_is_backwards(tmp_path: Path) -> None:
    turns = make_turns(tmp_path)
    ordered = [(turn.folder.name, turn.number) for turn in order_turns(turns)]
    there = [f"{method}_{length}_{kind}" for length in (16, 32) for method in ("sinusoidal", "alibi")
             for kind in ("unfused", "fast")]  # fmt: skip
    rounds = [(there, 1), (there[::-1], 2), (there, 3)]
    assert ordered == [(name, number) for names, number in rounds for name in names]


def test_a_machine_that_slows_down_steadily_meets_all_variants_alike(tmp_path: Path) -> None:
    for count in (2, 4, 6):
        turns = make_turns(tmp_path, dataclasses.replace(STUDY, turns=count))
        moments = Counter[str]()
        for moment, turn in enumerate(order_turns(turns)):
            moments[turn.folder.name] += moment
        assert len(set(moments.values())) == 1


def test_what_is_missing_is_measured_in_its_order(tmp_path: Path) -> None:
    turns = make_turns(tmp_path)
    ordered = order_turns(turns)
    assert select_turns(turns, code=CODE) == ordered
    done = [*ordered[:9], ordered[20]]  # the first round, one turn of the second, and one more
    for turn in done:
        write_turn(turn, [0.0, 1.0, 1.0])
    assert select_turns(turns, code=CODE) == [turn for turn in ordered if turn not in done]


def test_a_turn_is_measured_again_with_every_variant_and_its_record_stays(tmp_path: Path) -> None:
    turns = make_turns(tmp_path)
    ordered = order_turns(turns)
    for turn in ordered:
        write_turn(turn, [0.0, float(turn.number), 1.0], code="old" if turn.number == 2 else "1")
    assert select_turns(turns, code=CHANGED) == []  # nothing is to be measured
    again = select_turns(turns, code=CODE, again=(2,))
    assert again == [turn for turn in ordered if turn.number == 2]
    for seconds in (7.0, 8.0):
        for turn in again:
            turn.set_aside()
            assert turn.read() is None
            write_turn(turn, [0.0, seconds, seconds], code="1")
    speed = read_speeds(turns, STUDY)[FAST]
    assert (speed.turn_medians[2], speed.turns_replaced) == (8.0, 2)
    kept = [json.loads(path.read_text())["step_seconds"] for path in turns[FAST][1].replaced()]
    assert kept == [[0.0, 2.0, 1.0], [0.0, 7.0, 7.0]]
    turns[FAST][1].replaced()[0].unlink()  # by hand
    turns[FAST][1].set_aside()
    assert [path.name for path in turns[FAST][1].replaced()] == ["turn_2.replaced_2.json", "turn_2.replaced_3.json"]
    with pytest.raises(ConfigError, match=r"^--again=4: must be the number of a turn, from 1 to study.turns=3$"):
        select_turns(turns, code=CODE, again=(1, 4))


def test_no_turn_is_measured_beside_those_of_other_code(tmp_path: Path) -> None:
    turns = make_turns(tmp_path)
    write_turn(turns[FAST][0], [0.0, 1.0, 1.0], commit="another", code="1")
    assert len(select_turns(turns, code=CODE)) == 3 * len(turns) - 1
    with pytest.raises(ConfigError, match=r"was measured with code 1 of commit another, what is missing would be"):
        select_turns(turns, code=CHANGED)


def test_a_turn_runs_alone_on_all_cores_whatever_the_jobs(tmp_path: Path) -> None:
    turn = make_turns(tmp_path)[SLOW][1]
    assert turn.environment(0)["OMP_NUM_THREADS"] == "4"
    assert turn.command(0)[:4] == [sys.executable, COMMAND_SCRIPT, "study", "measure-turn"]
    assert turn.name == "sinusoidal_32_fast turn 2"


def test_a_turn_of_another_configuration_is_refused_and_named(tmp_path: Path) -> None:
    write_turn(make_turns(tmp_path)[FAST][0], [0.0, 1.0, 1.0])
    (changed, *_) = make_turns(tmp_path, model={"num_layers": 3})[FAST]
    with pytest.raises(ConfigError, match=r"turn_1.json was measured with another .*: model.num_layers=3, not 2; give"):
        changed.read()
    (longer, *_) = make_turns(tmp_path, dataclasses.replace(STUDY, steps_per_turn=4))[FAST]
    with pytest.raises(ConfigError, match=r"train.steps=5, not 3"):
        longer.read()
    assert make_turns(tmp_path, checkpoint={"every_steps": 7})[FAST][0].read() is not None  # no time depends on it
