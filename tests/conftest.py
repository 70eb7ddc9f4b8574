from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

import tests.support.device
import tests.support.flash_attn_on_cpu  # before alibi_attention, which asks it for its operators
from tests.support.costs import measure_costs, pytest_addoption, pytest_collection_modifyitems
from tests.support.economy import (
    keep_memory,
    leave_out_of_garbage_collection,
    take_share_of_cores,
    wake_up_in_turn,
)
from tests.support.run_folder import make_step, make_validation, write_run
from tests.support.runs import write_tokens

__all__ = ["make_step", "make_validation", "pytest_addoption", "pytest_collection_modifyitems", "write_run"]


def pytest_configure(config: pytest.Config) -> None:
    """A shell starts what runs in its background with SIGINT ignored, and children inherit that: tests send SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    keep_memory()
    if config.getoption("markexpr") != "cluster":
        take_share_of_cores()
    wake_up_in_turn()
    measure_costs(config)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """On a GPU leave out the files without a test for it: such a machine may lack what they import."""
    if not tests.support.device.ON_GPU:
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return None if any("mark.gpu" in path.read_text() for path in files) else True


def pytest_collection_finish(session: pytest.Session) -> None:
    """Where a test forks processes, let their server be the first one, with our imports."""
    leave_out_of_garbage_collection()
    if "tests.support.processes" in sys.modules and session.config.getoption("markexpr") != "cluster":
        sys.modules["tests.support.processes"].start_server()


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The prefix of a small token file."""
    return write_tokens(tmp_path_factory.mktemp("tokens"))
