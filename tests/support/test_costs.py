from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.costs import FAST_SECONDS, choose_fast, file_seconds, name_of, read_costs

BURNED_SECONDS = 0.3
TESTS = Path(__file__).parents[1]
CASES = [f"tests/a/test_x.py::test_cases[{case}]" for case in "abcd"]
SHARING = ["tests/a/test_x.py::test_shares_much", "tests/a/test_x.py::test_shares_it_too"]
UNKNOWN = ["tests/b/test_y.py::test_new[a::b]", "tests/b/test_y.py::test_new[c]"]
COSTS = {
    "test_x.py::test_cases": {"cases": 4, "seconds": 2 * FAST_SECONDS, "shared": 0.0},
    "test_x.py::test_shares_much": {"cases": 1, "seconds": 0.1, "shared": 5.0},
    "test_x.py::test_shares_it_too": {"cases": 1, "seconds": 0.1, "shared": 5.0},
}


def test_of_a_function_the_fast_tests_are_what_the_seconds_allow() -> None:
    assert choose_fast([*CASES, *SHARING, *UNKNOWN], COSTS) == {*CASES[:2], *UNKNOWN}


def test_a_file_costs_its_tests_and_once_what_they_share() -> None:
    assert file_seconds([*CASES, *SHARING, *UNKNOWN], COSTS) == {
        "tests/a/test_x.py": 2 * FAST_SECONDS + 0.1 + 0.1 + 5.0
    }


def test_a_test_keeps_its_name_where_its_folder_moves() -> None:
    assert name_of("tests/b/test_y.py::test_new[a::b]") == name_of("tests/test_y.py::test_new") == "test_y.py::test_new"


def test_seconds_are_also_those_of_processes_that_have_ended() -> None:
    """Asked in a process without other children: what serves this one may end meanwhile, and take its seconds along."""
    burn = f"import time\nwhile time.process_time() < {BURNED_SECONDS}: pass"
    program = (
        "import subprocess, sys\nfrom tests.support.costs import processor_seconds\nbefore = processor_seconds()\n"
        f"subprocess.run([sys.executable, '-S', '-c', {burn!r}], check=True)\nprint(processor_seconds() - before)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=True)
    assert BURNED_SECONDS * 0.9 <= float(done.stdout) < 10 * BURNED_SECONDS


def test_the_costs_that_are_kept_can_be_used() -> None:
    for name, cost in read_costs().items():
        assert name.startswith("test_"), name
        assert set(cost) == {"cases", "seconds", "shared"}, name
        assert cost["cases"] >= 1, name


def test_no_cost_is_that_of_a_test_that_has_gone() -> None:
    """Such a line has been moved or deleted with its test: delete it, too."""
    sources: dict[str, str] = {}
    for path in TESTS.rglob("test_*.py"):
        sources[path.name] = sources.get(path.name, "") + path.read_text()
    files_and_functions = [name.split("::") for name in read_costs()]
    assert [
        f"{file}::{name}" for file, name in files_and_functions if f"def {name}(" not in sources.get(file, "")
    ] == []
