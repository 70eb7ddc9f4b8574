"""A visit's steps as processes: what fails or hangs stops nothing else, and what is interrupted is gone on with."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megalibi.errors import FileError, JobError
from megalibi.studies.gpu_visit.step import (
    DONE,
    FAILED,
    INTERRUPTED,
    OUT_OF_TIME,
    SKIPPED,
    SUMMARY_FILE,
    StepOutcome,
    VisitStep,
    read_outcomes,
)
from megalibi.studies.gpu_visit.visit import Visit, run_visit
from tests.studies.machinery.test_jobs import DEADLINE_SECONDS, signal_when, wait_for

SECONDS = 60.0
APPEND = "import sys; from pathlib import Path; Path(sys.argv[1]).open('a').write('x')"
"""Shows how often a step was done."""


def script(folder: Path, name: str, code: str, **more: Any) -> VisitStep:
    command = (sys.executable, "-S", "-c", code, str(folder / f"{name}.txt"))
    return VisitStep(**{"name": name, "what": f"what {name} is", "command": command, "limit": SECONDS, **more})


def run(
    folder: Path, *steps: VisitStep, seconds: float = SECONDS, **more: Any
) -> tuple[dict[str, StepOutcome], list[str]]:
    said: list[str] = []
    visit = Visit(folder=folder, seconds=seconds, environment=os.environ, facts={"commit": "abc"}, say=said.append)
    records = run_visit(steps, visit, **more)
    assert read_outcomes(folder) == {record.name: record for record in records}
    return {record.name: record for record in records}, said


def test_a_step_over_its_limit_may_write_what_it_has(tmp_path: Path) -> None:
    code = (
        "import sys, time\nprint('under way', flush=True)\n"
        "try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    open(sys.argv[1], 'w').write('what there is')"
    )
    records, _ = run(tmp_path, script(tmp_path, "slow", code, limit=4.0))
    assert records["slow"].status == OUT_OF_TIME
    assert (tmp_path / "slow.txt").read_text() == "what there is"


def test_what_fails_or_hangs_is_reported_and_does_not_stop_the_next(tmp_path: Path) -> None:
    # Its child ignores SIGTERM and has its pipes: the whole group is killed.
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    hang = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-S', '-c', {child!r}]);"
        "open(sys.argv[1], 'w').write(str(p.pid)); print('not yet', flush=True); time.sleep(600)"
    )
    records, said = run(
        tmp_path,
        script(tmp_path, "bad", "print('error: no such card'); raise SystemExit(3)"),
        script(tmp_path, "hangs", hang, limit=1.0),
        script(tmp_path, "impossible", APPEND, impossible="not here"),
        script(tmp_path, "good", "print('hello')"),
    )
    statuses = {name: (record.status, record.said) for name, record in records.items()}
    assert statuses == {
        "bad": (FAILED, "exit code 3: no such card"),
        "hangs": (OUT_OF_TIME, "ended after 1 s: not yet"),
        "impossible": (SKIPPED, "not here"),
        "good": (DONE, ""),
    }
    assert 1.0 <= records["hangs"].seconds < SECONDS
    assert (tmp_path / "logs" / "good.log").read_text() == "hello\n"
    pid = int((tmp_path / "hangs.txt").read_text())
    deadline = time.monotonic() + DEADLINE_SECONDS
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert records["bad"].command.startswith(sys.executable)
    assert records["bad"].commit == "abc"
    assert said[1].startswith("[1/4] bad: failed in ")
    assert said[-1].startswith("[4/4] good: done in ")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # dead and not waited for
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_came_to_an_end_is_not_done_again_unless_it_is_asked_for(tmp_path: Path) -> None:
    output = tmp_path / "good.txt"
    steps = [
        script(tmp_path, "good", APPEND, output=output),
        script(tmp_path, "bad", f"{APPEND}; raise SystemExit(1)"),
        script(tmp_path, "slow", f"{APPEND}; import time; time.sleep(60)", limit=1.0),
    ]
    run(tmp_path, *steps)
    _, said = run(tmp_path, *steps)
    contents = {name: (tmp_path / f"{name}.txt").read_text() for name in ("good", "bad", "slow")}
    assert contents == {"good": "x", "bad": "x", "slow": "xx"}
    assert said[:2] == ["[1/3] good: done before", "[2/3] bad: failed before, --again bad repeats it"]

    run(tmp_path, *steps[:2], again=["good", "bad"])
    assert output.read_text() == "x"  # the old result was removed first
    assert (tmp_path / "bad.txt").read_text() == "xx"
    assert read_outcomes(tmp_path)["slow"].status == OUT_OF_TIME  # what is not asked for stays known


def test_a_step_for_which_too_little_time_is_left_is_skipped_and_done_the_next_time(tmp_path: Path) -> None:
    steps = [script(tmp_path, "long", APPEND, least=30.0), script(tmp_path, "short", APPEND, least=3.0)]
    records, _ = run(tmp_path, *steps, seconds=20.0)
    assert records["long"].status == SKIPPED
    assert records["long"].said.endswith("s left, 30 s are needed")
    assert records["short"].status == DONE
    records, _ = run(tmp_path, *steps)
    assert [record.status for record in records.values()] == [DONE, DONE]


def test_a_step_in_the_background_runs_beside_the_next_and_is_waited_for(tmp_path: Path) -> None:
    wait = "import sys, time; from pathlib import Path\nwhile not Path({!r}).exists(): time.sleep(0.02)"
    meanwhile, after = tmp_path / "meanwhile.txt", tmp_path / "warm.txt"
    records, said = run(
        tmp_path,
        script(tmp_path, "warm", f"{wait.format(str(meanwhile))}\n{APPEND}", in_background=True),
        script(tmp_path, "meanwhile", APPEND),
        script(tmp_path, "after", f"assert __import__('os').path.exists({str(after)!r})", after="warm"),
    )
    assert {name: record.status for name, record in records.items()} == dict.fromkeys(records, DONE)
    ends = [line.partition(" in ")[0] for line in said if "done" in line]
    assert set(ends[:2]) == {"[2/3] meanwhile: done", "[1/3] warm: done"}  # they may end in one moment
    assert ends[2:] == ["[3/3] after: done"]


def test_a_step_in_the_background_has_a_limit_too(tmp_path: Path) -> None:
    records, _ = run(tmp_path, script(tmp_path, "a", "import time; time.sleep(60)", limit=1.0, in_background=True))
    assert records["a"].status == OUT_OF_TIME


def test_an_interruption_keeps_what_is_there(tmp_path: Path) -> None:
    ready = f"{APPEND}; import time; time.sleep(60)"
    steps = [script(tmp_path, "first", APPEND), script(tmp_path, "second", ready), script(tmp_path, "third", APPEND)]
    with signal_when([tmp_path / "second.txt"], signal.SIGINT), pytest.raises(KeyboardInterrupt):
        run(tmp_path, *steps)
    assert {name: r.status for name, r in read_outcomes(tmp_path).items()} == {"first": DONE, "second": INTERRUPTED}
    assert not (tmp_path / "third.txt").exists()

    steps[1] = script(tmp_path, "second", APPEND)
    records, said = run(tmp_path, *steps)
    assert [record.status for record in records.values()] == [DONE] * 3
    assert (tmp_path / "first.txt").read_text() == "x"
    assert said[0] == "[1/3] first: done before"


def test_a_visit_that_was_killed_goes_on(tmp_path: Path) -> None:
    steps = [script(tmp_path, "first", APPEND), script(tmp_path, "third", APPEND)]
    write_pid = (
        "import os, sys; p = sys.argv[1]; open(p + '.tmp', 'w').write(str(os.getpid())); os.rename(p + '.tmp', p)"
    )
    hangs = script(tmp_path, "second", f"{write_pid}; import time; time.sleep(600)")
    killed = os.fork()
    if killed == 0:
        try:
            run(tmp_path, steps[0], hangs)
        finally:
            os._exit(0)
    wait_for(tmp_path / "second.txt")
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    assert {name: record.status for name, record in read_outcomes(tmp_path).items()} == {"first": DONE}

    second = script(tmp_path, "second", APPEND)
    with pytest.raises(JobError, match="second is running already"):  # it would disturb what is measured
        run(tmp_path, steps[0], second)
    os.kill(int((tmp_path / "second.txt").read_text()), signal.SIGKILL)
    deadline, records = time.monotonic() + DEADLINE_SECONDS, {}
    while "third" not in records and time.monotonic() < deadline:  # until the killed one is gone
        with suppress(JobError):
            records, _ = run(tmp_path, steps[0], second, steps[1])
    assert [record.status for record in records.values()] == [DONE] * 3
    assert (tmp_path / "first.txt").read_text() == "x"


@pytest.mark.parametrize("content", ["", "{}", '{"steps": [{"name": "a"}]}', '{"steps": [{"nam": "a"}]}'])
def test_a_summary_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / SUMMARY_FILE).write_text(content)
    with pytest.raises(FileError, match=r"summary\.json is not a visit's .*: move it away, or give another folder"):
        run(tmp_path, script(tmp_path, "a", APPEND))
    assert not (tmp_path / "a.txt").exists()


def test_the_summary_is_json_with_the_facts_first(tmp_path: Path) -> None:
    run(tmp_path, script(tmp_path, "a", APPEND))
    summary = json.loads((tmp_path / SUMMARY_FILE).read_text())
    assert list(summary) == ["commit", "steps"]
