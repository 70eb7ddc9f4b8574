from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalibi.errors import ConfigError
from megalibi.studies.comparison.disturbance import TurnConditions
from megalibi.studies.comparison.measured_code import Code
from megalibi.studies.comparison.speed import read_speeds, summarize_turns
from tests.support.turns import FAST, HARDWARE, SLOW, STUDY, make_turns, record_of, write_turn


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


def test_what_disturbed_a_turn_is_kept(tmp_path: Path) -> None:
    turns = make_turns(tmp_path)[FAST]
    load = {"load_before": 0.5, "load_after": 1.5, "other_busy_cores": 0.25}
    write_turn(turns[0], [9.0, 1.0, 2.0], **load)
    write_turn(turns[1], [9.0, 2.0, 2.0])  # of an earlier form, which recorded no load
    write_turn(turns[2], [9.0, 4.0, 4.0], commit="abc-dirty")
    speed = read_speeds({FAST: turns}, STUDY)[FAST]
    assert speed.turn_conditions == {
        1: TurnConditions(step_spread=pytest.approx(1 / 3), **load),  # type: ignore[arg-type]
        2: TurnConditions(step_spread=0.0, load_before=None, load_after=None, other_busy_cores=None),
        3: TurnConditions(step_spread=0.0, load_before=None, load_after=None, other_busy_cores=None),
    }
    assert speed.turn_spread == pytest.approx((0.5 + 2.0 + 2.5) / 3.0 / 2.0)
    assert speed.disturbance == "disturbed, 83.3% between its turns"
    assert (speed.codes, speed.turns_replaced) == ((Code(commit="abc", sha256=""),), 0)


def test_turns_of_different_code_are_not_compared(tmp_path: Path) -> None:
    turns = make_turns(tmp_path)
    write_turn(turns[FAST][0], [0.0, 1.0, 1.0])
    write_turn(turns[SLOW][0], [0.0, 1.0, 1.0], commit="def")
    with pytest.raises(ConfigError, match=r"turn_1.json was measured with commit abc, another turn with commit def"):
        read_speeds(turns, STUDY)


def test_steady_work_beside_all_turns_disturbs_a_cpu_and_no_gpu(tmp_path: Path) -> None:
    turns = make_turns(tmp_path)[FAST]
    for gpu, disturbance in (({}, "disturbed, 0.30 cores busy with other work"), ({"gpu": "a GPU"}, "")):
        for turn in turns:
            write_turn(turn, [0.0, 1.0, 1.0], other_busy_cores=0.3, hardware={**HARDWARE, **gpu})
        assert read_speeds({FAST: turns}, STUDY)[FAST].disturbance == disturbance
