"""What each test costs, and what follows from it: the order of files on two cores, and the tests of `make test-fast`.

``pytest --write-costs`` (``make test-costs``) measures the processor seconds of each test, with those of the processes
that it starts and of the pools that serve it, and writes them to tests/costs.json: seconds of a processor, not of a
clock, so that other work on the machine does not count. A test that the file does not know is taken to cost nothing.

``pytest --fast`` runs of each test function as many cases as 0.75 s of a processor allow: all cases of most
functions, some of a function with many, none where a single case or a fixture that is shared takes longer.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / "costs.json"
FAST_SECONDS = 0.75
"""Of a function's cases together, and of the fixtures that they share."""
RECORDED_FROM_SECONDS = 0.3
"""A function that costs less, with its fixtures, is not written down."""
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
COST = "processor seconds: own, shared"

Costs = dict[str, dict[str, float]]
"""By file name and function: how many ``cases`` it has, the ``seconds`` of all of them, and those of the dearest of the
fixtures that they share with others (``shared``)."""


def name_of(nodeid: str) -> str:
    """Return the name of a test function in the file of costs: without folders, which move, and without its case."""
    path, _, function = nodeid.partition("[")[0].partition("::")
    return f"{path.rpartition('/')[2]}::{function}"


def read_costs() -> Costs:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def processor_seconds() -> float:
    """Return what this process, all that it has started and all that those have started have used of the processors."""
    used, children = {}, defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        used[int(stat.parts[2])] = sum(map(int, fields[11:15]))  # itself and its children that have ended: proc(5)
        children[int(fields[1])].append(int(stat.parts[2]))
    total, processes = 0, [os.getpid()]
    while processes:
        process = processes.pop()
        total += used.get(process, 0)
        processes += children[process]
    return total / TICKS_PER_SECOND


class Recorder:
    """Measures the tests of one process, and gathers what all processes of a session have measured."""

    def __init__(self) -> None:
        self.cases: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.shared: Counter[str] = Counter()
        self._fixtures: dict[Any, float] = {}
        self._began = self._made_here = 0.0
        self._depth = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[Any]:
        if fixturedef.scope == "function":
            return (yield)
        self._depth += 1
        began = processor_seconds()
        try:
            return (yield)
        finally:
            self._depth -= 1
            self._fixtures[fixturedef] = processor_seconds() - began
            self._made_here += self._fixtures[fixturedef] if self._depth == 0 else 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Iterator[None]:
        self._began, self._made_here = processor_seconds(), 0.0
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Function) -> Iterator[None]:
        try:
            return (yield)
        finally:
            own = processor_seconds() - self._began - self._made_here
            fixtures = [f for definitions in item._fixtureinfo.name2fixturedefs.values() for f in definitions]
            item.user_properties.append((COST, (own, max((self._fixtures.get(f, 0.0) for f in fixtures), default=0.0))))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for own, shared in (value for name, value in report.user_properties if name == COST):
            name = name_of(report.nodeid)
            self.cases[name] += 1
            self.seconds[name] += own
            self.shared[name] = max(self.shared[name], shared)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write what was measured over what is known of other tests."""
        if hasattr(session.config, "workerinput"):
            return
        costs = read_costs()
        for name, cases in self.cases.items():
            costs.pop(name, None)
            if self.seconds[name] + self.shared[name] >= RECORDED_FROM_SECONDS:
                costs[name] = {
                    "cases": cases,
                    "seconds": round(self.seconds[name], 1),
                    "shared": round(self.shared[name], 1),
                }
        lines = (f"{json.dumps(name)}: {json.dumps(cost)}" for name, cost in sorted(costs.items()))
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="of each test function, what 0.75 s of a processor allow")
    parser.addoption("--write-costs", action="store_true", help="measure what the tests cost, into tests/costs.json")


def measure_costs(config: pytest.Config) -> None:
    if config.option.write_costs:
        config.pluginmanager.register(Recorder())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    costs = read_costs()
    if config.option.fast:
        chosen = choose_fast([item.nodeid for item in items], costs)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
        items[:] = [item for item in items if item.nodeid in chosen]
    if hasattr(config, "workerinput"):  # of pytest-xdist: the dearest file first, so that none is left alone in the end
        by_file = file_seconds([item.nodeid for item in items], costs)
        items.sort(key=lambda item: (-by_file[item.nodeid.partition("::")[0]], item.nodeid.partition("::")[0]))


def choose_fast(nodeids: list[str], costs: Costs) -> set[str]:
    """Return of each function the first cases that ``FAST_SECONDS`` allow."""
    chosen, taken = set(), Counter[str]()
    for nodeid in nodeids:
        name = name_of(nodeid)
        cost = costs.get(name, {"cases": 1, "seconds": 0.0, "shared": 0.0})
        taken[name] += 1
        if cost["shared"] + taken[name] * cost["seconds"] / cost["cases"] <= FAST_SECONDS:
            chosen.add(nodeid)
    return chosen


def file_seconds(nodeids: list[str], costs: Costs) -> Counter[str]:
    """Return what the tests of each file cost together."""
    seconds, shared = Counter[str](), Counter[str]()
    for nodeid in nodeids:
        file, cost = nodeid.partition("::")[0], costs.get(name_of(nodeid))
        if cost is None:
            continue
        seconds[file] += cost["seconds"] / cost["cases"]
        shared[file] = max(shared[file], cost["shared"])
    return seconds + shared
