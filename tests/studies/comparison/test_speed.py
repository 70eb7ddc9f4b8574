from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megalibi.config import Config, config_to_dict
from megalibi.errors import ConfigError
from megalibi.plan.memory_trace import MemoryByKind
from megalibi.studies.comparison.speed import Turn, order_turns, plan_turns, read_speeds, summarize_turns
from megalibi.studies.comparison.study import ComparedModel, CompareStudy, Variant
from megalibi.studies.machinery.machine import COMMAND_SCRIPT, Machine
from tests.support.runs import make_config

STUDY = CompareStudy(lengths=(16, 32), turns=3, warm_steps=1, steps_per_turn=2, valid_tokens=1000)
FAST, SLOW = (
    Variant(model=ComparedModel(method="alibi", length=16), attention="fast"),
    Variant(model=ComparedModel(method="sinusoidal", length=32), attention="fast"),
)
HARDWARE = {"cpu": "a CPU", "cores": 2, "threads": 1, "memory_bytes": 1}


def make_turns(folder: Path, study: CompareStudy = STUDY, **sections: Any) -> dict[Variant, list[Turn]]:
    train = {"output_dir": str(folder), "global_batch_size": 4, "eval_samples": 4}
    base = make_config("tokens", data={"seq_length": 32, "valid": "tokens"}, train=train, **sections)
    machine = Machine(environment={}, cores=4, jobs=2)
    return plan_turns(base, study, machine)


def memory_of(weights: int) -> MemoryByKind:
    return MemoryByKind(weights=weights, gradients=2, optimizer_states=3, activations=4, attention_workspace=5, other=6)


def record_of(config: Config, seconds: list[float], *, weights: int = 1, **changes: Any) -> dict[str, Any]:
    record = {"step_seconds": seconds, "device_bytes": 100 * weights, "memory": dataclasses.asdict(memory_of(weights))}
    return {**record, "config": config_to_dict(config), "ranks": 1, "hardware": HARDWARE, **changes}


def write_turn(turn: Turn, seconds: list[float], **changes: Any) -> None:
    turn.folder.mkdir(parents=True, exist_ok=True)
    turn.output.write_text(json.dumps(record_of(turn.config, seconds, **changes)))


def test_warm_steps_do_not_count_and_all_others_do(tmp_path: Path) -> None:
    config = make_turns(tmp_path)[FAST][0].config
    records = {1: record_of(config, [9.0, 1.0, 2.0], weights=7), 2: record_of(config, [9.0, 3.0, 4.0], weights=1)}
    speed = summarize_turns(FAST, records, 1, config)
    assert (speed.step_seconds.low, speed.step_seconds.median, speed.step_seconds.high) == (1.75, 2.5, 3.25)
    assert speed.turn_medians == {1: 1.5, 2: 3.5}
    assert speed.batch_tokens == 4 * 32
    assert (speed.tokens_per_second, speed.updates_per_hour) == (128 / 2.5, 3600 / 2.5)
    assert (speed.memory.total, speed.device_bytes) == (27, 700)  # the highest of the turns


def test_gain_is_taken_turn_by_turn(tmp_path: Path) -> None:
    # The machine is three times as slow in the second turn, for both: the gain is not.
    turns = make_turns(tmp_path)
    for number, slowness in enumerate((1.0, 3.0, 1.0)):
        write_turn(turns[FAST][number], [0.0, slowness, slowness])
        write_turn(turns[SLOW][number], [0.0, 1.5 * slowness, 1.5 * slowness])
    speeds = read_speeds(turns, STUDY)
    gain = speeds[FAST].rate_gain(speeds[SLOW])
    assert [gain.low, gain.median, gain.high] == pytest.approx([0.5, 0.5, 0.5])


def test_turns_that_are_missing_are_left_out_of_the_gain(tmp_path: Path) -> None:
    turns = make_turns(tmp_path)
    for number, seconds in ((0, 1.0), (1, 5.0), (2, 1.0)):
        write_turn(turns[FAST][number], [0.0, seconds, seconds])
    write_turn(turns[SLOW][2], [0.0, 2.0, 2.0])
    speeds = read_speeds(turns, STUDY)
    assert set(speeds) == {FAST, SLOW}
    assert speeds[FAST].rate_gain(speeds[SLOW]).median == pytest.approx(1.0)


def test_every_other_round_is_backwards(tmp_path: Path) -> None:
    turns = make_turns(tmp_path)
    there = [variant.name for variant in turns]
    ordered = [(turn.folder.name, turn.number) for turn in order_turns(turns)]
    rounds = [(there, 1), (there[::-1], 2), (there, 3)]
    assert ordered == [(name, number) for names, number in rounds for name in names]


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


@pytest.mark.parametrize(
    "changes",
    [{"hardware": {**HARDWARE, "cpu": "another CPU"}}, {"hardware": {**HARDWARE, "threads": 2}}, {"ranks": 2}],
)
def test_turns_of_different_hardware_are_not_compared(tmp_path: Path, changes: dict[str, Any]) -> None:
    turns = make_turns(tmp_path)
    write_turn(turns[FAST][0], [0.0, 1.0, 1.0])
    write_turn(turns[SLOW][0], [0.0, 1.0, 1.0], hardware={**HARDWARE, "memory_bytes": 2})
    assert set(read_speeds(turns, STUDY)) == {FAST, SLOW}
    write_turn(turns[SLOW][1], [0.0, 1.0, 1.0], **changes)
    with pytest.raises(ConfigError, match="were measured on different hardware"):
        read_speeds(turns, STUDY)
