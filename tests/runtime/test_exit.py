from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megalibi.errors import ConfigError
from megalibi.runtime.exit import EXIT_INTERRUPTED, EXIT_USER_ERROR, run_rank, run_tool
from megalibi.runtime.ranks import Place


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def exit_code(main: Callable[[], int | None]) -> object:
    with pytest.raises(SystemExit) as ended:
        run_tool(main)
    return ended.value.code


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "[/pair.cc:534] Connection closed by peer [10.1.0.2]:31452. This is",
            "10.1.0.2 has ended or is cut off (Connection closed by peer)",
        ),
        (
            "[/pair.cc:537] Read error [10.1.0.2]:31452: Connection reset by peer. This",
            "10.1.0.2 has ended or is cut off (Connection reset by peer)",
        ),
        (
            "[/pair.cc:601] Write error [fe80::1%eth0]:31452: Broken pipe. GLHF",
            "fe80::1%eth0 has ended or is cut off (Broken pipe)",
        ),
    ],
)
def test_a_lost_rank_is_one_line_with_its_address(
    said: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(_place: Place) -> None:
        raise RuntimeError(said)

    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    run_rank(work)
    assert codes == [1]
    advice = "what it said last, or its launcher, has the cause; start the same command again"
    assert capsys.readouterr().err == f"error: a rank at {expected}: {advice}\n"


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
