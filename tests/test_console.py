"""Progress as its readers see it: a terminal is a real one, and a log is a real pipe."""

from __future__ import annotations

import math
import os
import pty
import subprocess
import sys
import time
from io import StringIO

from rich.console import Console

from megalibi.console import Progress
from tests.support.terminal import read_terminal

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
PROGRAM = """
import sys, time
from megalibi.console import Progress
with Progress(line_every_seconds=float(sys.argv[1]), stays=len(sys.argv) > 2) as progress:
    for task in ("first", "second"):
        progress.begin(task)
    for done in range(1, 5):
        progress.show("first", f"{done} of 4 [units]", done=done, total=4)
        progress.show("second", f"{done} so far", done=done)
        time.sleep(0.15)  # longer than a bar takes to be drawn anew
    progress.say("a line that stays [as it is]")
    progress.drop("second")
    time.sleep(0.15)
print("the end", file=sys.stderr)
"""


def show_on_terminal(*words: str) -> str:
    """Return what the program writes to a terminal that is its standard error."""
    terminal, end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *words], stderr=end, env=environment)
    os.close(end)
    shown = read_terminal(terminal)
    assert process.wait() == 0
    return shown


def show_in_pipe(*words: str) -> list[str]:
    """Return the lines that the program writes to a pipe that is its standard error."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_a_terminal_gets_a_bar_for_each_task_and_is_left_as_it_was() -> None:
    shown = show_on_terminal("0")
    assert "starting" in shown
    assert shown.count("━") > 0
    for words in ("1 of 4 [units]", "4 of 4 [units]", "4 so far"):
        assert words in shown
    assert "first: 4 of 4" not in shown  # no line beside the bar
    assert shown.count("a line that stays [as it is]") == 1
    after = shown[shown.index("a line that stays") :]
    assert "second" not in after[after.rindex("4 of 4") :]
    assert shown.rindex(SHOW_CURSOR) > shown.rindex(HIDE_CURSOR)
    assert "\x1b[2K" in shown[shown.rindex("4 of 4") :]  # the bar is wiped
    assert shown.endswith("the end\r\n")


def test_bars_that_stay_are_not_wiped() -> None:
    shown = show_on_terminal("0", "stays")
    assert "\x1b[2K" not in shown[shown.rindex("4 of 4") :]


def test_a_pipe_gets_lines_and_no_control_characters() -> None:
    lines = show_in_pipe("0")
    expected = [line for n in range(1, 5) for line in (f"first: {n} of 4 [units]", f"second: {n} so far")]
    assert lines == [*expected, "a line that stays [as it is]", "the end"]


def test_lines_come_no_more_often_than_they_shall() -> None:
    assert show_in_pipe("60") == show_in_pipe("inf") == ["a line that stays [as it is]", "the end"]


def test_each_task_has_a_time_of_its_own() -> None:
    output = StringIO()
    with Progress(Console(file=output), line_every_seconds=1.0) as progress:
        assert not progress.is_due("a")
        time.sleep(1.1)
        progress.show("b", "new")
        assert progress.is_due("a")
        progress.show("a", "due")
        progress.show("a", "too soon")
        progress.show("b", "not yet")
        time.sleep(1.1)
        progress.show("b", "due", done=3, total=2)
        progress.drop("b")
        progress.show("b", "a new task")
    assert output.getvalue().splitlines() == ["a: due", "b: due"]


def test_a_task_without_a_name_has_its_words_alone() -> None:
    output = StringIO()
    with Progress(Console(file=output), line_every_seconds=0.0) as progress:
        progress.show("", "3 documents")
    assert output.getvalue() == "3 documents\n"


def test_with_infinity_nothing_is_due() -> None:
    progress = Progress(Console(file=StringIO()), line_every_seconds=math.inf)
    assert not progress.is_due("a")
