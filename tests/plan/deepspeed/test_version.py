from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from megalibi.plan import deepspeed
from megalibi.plan.deepspeed.version import REPLAYED_VERSION, describe_other_version
from megalibi.plan.run_plan import plan_run
from tests.support.steps import make_config

ROOT = Path(__file__).parents[3]
OTHER = "0.20.1"
LINE = (
    f"memory and communication are planned as DeepSpeed {REPLAYED_VERSION} has them, and {OTHER} is installed: "
    "what ZeRO allocates and sends may differ"
)


def test_another_version_is_named_beside_the_one_that_is_replayed() -> None:
    assert describe_other_version(OTHER) == LINE
    assert describe_other_version(f"{REPLAYED_VERSION}.post1") is not None


def test_the_replayed_version_needs_no_word() -> None:
    assert describe_other_version(REPLAYED_VERSION) is None
    assert describe_other_version(f"{REPLAYED_VERSION}+cpu") is None  # a local build of the same code


def test_the_replayed_version_is_the_one_that_is_tested() -> None:
    """What the constraints install is what the tests of the plan's memory compare with."""
    assert f"deepspeed=={REPLAYED_VERSION}\n" in (ROOT / "constraints.txt").read_text()


def test_every_replay_states_its_version() -> None:
    folder = Path(deepspeed.__file__).parent
    for path in sorted(folder.glob("stage_*.py")):
        assert re.findall(r"\d+\.\d+\.\d+", path.read_text().split('"""')[1]) == [REPLAYED_VERSION], path.name


def test_a_plan_says_it_in_one_line_and_logs_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="megalibi.plan.run_plan"):
        assert plan_run(make_config(), 1, deepspeed_version=REPLAYED_VERSION).replay_note is None
        assert caplog.messages == []
        assert plan_run(make_config(), 1, deepspeed_version=OTHER).replay_note == LINE
        assert caplog.messages == [LINE]
