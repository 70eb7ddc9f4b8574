from __future__ import annotations

from megalibi.studies.comparison.disturbance import TurnConditions
from megalibi.studies.comparison.report.advice import advise, drop_options
from megalibi.studies.comparison.study import ALIBI, SINUSOIDAL, ComparedModel
from tests.support.paper_comparison import PAIR, change_speed, change_turns, empty_results, paper_results

COMMAND = "python tools/compare_1p3b.py --scale small"


def test_even_turns_and_nothing_measured_need_no_advice() -> None:
    assert advise(paper_results().speeds, COMMAND) == advise(empty_results().speeds, COMMAND) == []


def test_each_disturbed_speed_is_named_with_its_turns_and_one_command_measures_them_again() -> None:
    results = change_turns(paper_results(), PAIR[1], "unfused", 1.0, 2.0, 1.0)
    results = change_turns(results, ComparedModel(method=ALIBI, length=512), "fast", 1.0, 1.0, 1.1)
    first, second, last, counted = advise(results.speeds, f"{COMMAND} --again 1 --part=all")
    assert first == (
        "disturbed: sinusoidal, 2,048, unfused attention: 66.7% between its turns (1: 486 s, 2: 973 s, 3: 486 s)"
    )
    assert second.startswith("disturbed: ALiBi, 512, fast attention: 6.7% between its turns (1: ")
    assert last == (
        f"on a quiet machine this measures turns 2,3 of every model again: {COMMAND} --part speed --again 2,3"
    )
    assert counted.startswith("turns that are chosen for what they measured are counted")


def test_too_few_turns_are_counted_and_measured_by_the_same_command() -> None:
    results = change_turns(paper_results(), ComparedModel(method=SINUSOIDAL, length=512), "fast", 1.0, 1.0)
    assert advise(results.speeds, COMMAND) == [
        "too few turns: 1 of 12 speeds have fewer than 3",
        f"on a quiet machine this measures the turns that are missing: {COMMAND} --part speed study.turns=3",
    ]
    slow = change_turns(results, PAIR[0], "fast", 1.0, 2.0)
    only = {variant: speed for variant, speed in slow.speeds.items() if variant.model == PAIR[0]}
    assert advise(only, COMMAND)[-2] == (
        "on a quiet machine this measures the turns that are missing and turn 2 of every model again: "
        f"{COMMAND} --part speed --again 2 study.turns=3"
    )


def test_steady_work_beside_turns_is_said_and_measures_those_turns_again() -> None:
    conditions = {
        n: TurnConditions(step_spread=0.0, load_before=None, load_after=None, other_busy_cores=cores)
        for n, cores in enumerate((0.1, 0.4, 0.6), start=1)
    }
    results = change_speed(paper_results(), PAIR[0], "fast", turn_conditions=conditions)
    first, last, _ = advise(results.speeds, COMMAND)
    assert "ALiBi, 1,024, fast attention: 0.40 cores busy with other work (1: " in first
    assert last.endswith(" --again 2,3")
    assert advise(change_speed(results, PAIR[0], "fast", on_gpu=True).speeds, COMMAND) == []


def test_options_are_dropped_with_their_values() -> None:
    command = "python tools/compare_1p3b.py --again '1, 2' --scale small --part=all --again=2 'study.lengths=[1, 2]'"
    assert drop_options(command, "--again") == (
        "python tools/compare_1p3b.py --scale small --part=all 'study.lengths=[1, 2]'"
    )


def test_the_command_of_the_advice_is_one_that_the_tool_takes() -> None:
    from megalibi.cli.command import spell_script
    from megalibi.cli.study import compare_1p3b

    results = change_turns(paper_results(), PAIR[1], "fast", 1.0, 2.0)
    words = advise(results.speeds, f"{COMMAND} study.turns=2")[-2].split("compare_1p3b.py ")[1].split()
    arguments = compare_1p3b.COMMAND.parse(words, spell_script("tools/compare_1p3b.py"))
    assert (arguments.again, arguments.part) == ((2,), "speed")
    assert compare_1p3b.load_comparison(arguments)[0].turns == 3
