from __future__ import annotations

import dataclasses

from megalibi.studies.comparison.report.advice import advise
from megalibi.studies.comparison.study import ALIBI, SINUSOIDAL, ComparedModel
from tests.support.paper_comparison import PAIR, change_turns, empty_results, paper_results

COMMAND = "python tools/compare_1p3b.py --scale small"


def test_even_turns_and_nothing_measured_need_no_advice() -> None:
    assert advise(paper_results().speeds, COMMAND) == advise(empty_results().speeds, COMMAND) == []


def test_each_disturbed_speed_is_named_with_its_turns_and_one_command_measures_them_again() -> None:
    results = change_turns(paper_results(), PAIR[1], "unfused", 1.0, 2.0, 1.0)
    results = change_turns(results, ComparedModel(method=ALIBI, length=512), "fast", 1.0, 1.0, 1.1)
    first, second, last = advise(results.speeds, f"{COMMAND} --again 1 --part=all")
    assert first == (
        "disturbed: sinusoidal, 2,048, unfused attention: 100.0% between its turns (1: 486 s, 2: 973 s, 3: 486 s)"
    )
    assert second.startswith("disturbed: ALiBi, 512, fast attention: 10.0% between its turns (1: ")
    assert last == (
        f"on a quiet machine this measures these turns alone, with every model: {COMMAND} --part speed --again 2,3"
    )


def test_too_few_turns_are_counted_and_measured_by_the_same_command() -> None:
    results = change_turns(paper_results(), ComparedModel(method=SINUSOIDAL, length=512), "fast", 1.0, 1.0)
    assert advise(results.speeds, COMMAND) == [
        "too few turns: 1 of 12 speeds have fewer than 3",
        f"on a quiet machine this measures the missing turns alone: {COMMAND} --part speed study.turns=3",
    ]
    slow = change_turns(results, PAIR[0], "fast", 1.0, 2.0)
    only = {variant: speed for variant, speed in slow.speeds.items() if variant.model == PAIR[0]}
    assert advise(only, COMMAND)[-1].endswith(f"{COMMAND} --part speed --again 2 study.turns=3")


def test_the_command_of_the_advice_is_one_that_the_tool_takes() -> None:
    from megalibi.cli.command import spell_script
    from megalibi.cli.study import compare_1p3b

    results = dataclasses.replace(change_turns(paper_results(), PAIR[1], "fast", 1.0, 2.0))
    words = advise(results.speeds, f"{COMMAND} study.turns=2")[-1].split("compare_1p3b.py ")[1].split()
    arguments = compare_1p3b.COMMAND.parse(words, spell_script("tools/compare_1p3b.py"))
    assert (arguments.again, arguments.part) == ((2,), "speed")
    assert compare_1p3b.load_comparison(arguments)[0].turns == 3
