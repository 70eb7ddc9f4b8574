from __future__ import annotations

import io
import logging
import socket
from collections.abc import Iterator

import pytest

from megalibi import log


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("megalibi", "alibi_attention")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_loggers_hang_below_megalibi() -> None:
    assert log.get_logger("megalibi.train.loop").name == "megalibi.train.loop"
    assert log.get_logger("__main__").name == "megalibi.__main__"


def test_a_process_alone_names_no_rank(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure()
    log.get_logger("megalibi.train.loop").info("%d steps", 3)
    stderr = capsys.readouterr().err
    assert stderr.endswith("INFO 3 steps\n")
    assert "rank" not in stderr


def test_other_ranks_speak_from_warning_on_and_name_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(rank=3, world_size=4)
    logger = log.get_logger("megalibi.train.loop")
    logger.info("not this")
    logger.warning("this")
    assert capsys.readouterr().err.endswith(f"WARNING [rank 3/4 on {socket.gethostname()}] this\n")


def test_the_level_is_rank_0s_and_never_loosens_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    for rank, level, heard in ((0, logging.DEBUG, True), (0, logging.ERROR, False), (1, logging.DEBUG, False)):
        log.configure(rank=rank, world_size=2, level=level)
        log.get_logger("megalibi.train.loop").debug("whisper")
        assert ("whisper" in capsys.readouterr().err) == heard


def test_configuring_twice_says_everything_once(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure()
    log.configure()
    log.get_logger("megalibi.train.loop").warning("once")
    assert capsys.readouterr().err.count("once") == 1


def test_messages_go_to_the_standard_error_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    log.configure()
    above_a_progress_bar = io.StringIO()
    monkeypatch.setattr("sys.stderr", above_a_progress_bar)
    log.get_logger("megalibi.train.loop").warning("above")
    assert "above" in above_a_progress_bar.getvalue()
