from __future__ import annotations

from collections.abc import Callable

import pytest

from megalibi.config import ConfigError
from megalibi.config.cli import EXIT_INTERRUPTED, EXIT_USER_ERROR, run_tool


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def exit_code(main: Callable[[], int | None]) -> object:
    with pytest.raises(SystemExit) as ended:
        run_tool(main)
    return ended.value.code


def test_what_main_returns_is_the_exit_code() -> None:
    assert exit_code(lambda: None) is None  # which sys.exit makes 0
    assert exit_code(lambda: 3) == 3


def test_a_users_error_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(raising(ConfigError("model.hidden_size=0\n  is not\tallowed"))) == EXIT_USER_ERROR == 2
    assert capsys.readouterr() == ("", "error: model.hidden_size=0 is not allowed\n")


def test_ctrl_c_is_one_line_and_what_shells_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(raising(KeyboardInterrupt())) == EXIT_INTERRUPTED == 130
    assert capsys.readouterr() == ("", "error: interrupted\n")


def test_our_own_errors_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="ours"):
        run_tool(raising(RuntimeError("ours")))
