from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megalibi.errors import ConfigError
from megalibi.runtime.exit import EXIT_INTERRUPTED, EXIT_USER_ERROR, run_tool


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


def test_a_file_that_cannot_be_used_is_the_users_to_mend_and_a_connection_is_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing, long = tmp_path / "none", tmp_path / ("n" * 300)
    for path, end in (
        (missing, f"{missing}: No such file or directory; give another path, or mend that one\n"),
        (tmp_path, f"{tmp_path}: Is a directory; give another path, or mend that one\n"),
        (long, f"{str(long)[:100]}...: File name too long; give a shorter name\n"),
    ):
        assert exit_code(lambda path=path: path.read_bytes()) == EXIT_USER_ERROR
        assert capsys.readouterr().err == f"error: {end}"
    with pytest.raises(ConnectionResetError):
        run_tool(raising(ConnectionResetError(104, "Connection reset by peer")))
