"""Every parser for a moment, and again with what once broke one (found/TARGET/*).

`python -m tests.fuzz --minutes 60` goes on where this ends.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings

from tests.fuzz.__main__ import try_input
from tests.fuzz.targets import TARGETS

FOUND = Path(__file__).parent / "found"


@pytest.mark.parametrize("name", TARGETS)
def test_what_cannot_be_read_is_refused_in_a_line(name: str, tmp_path: Path) -> None:
    target, place = TARGETS[name](tmp_path), tmp_path / "place"
    place.mkdir()
    tried = 0

    @seed(0)
    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(target.inputs)
    def attempt(content: bytes) -> None:
        nonlocal tried
        tried += 1
        try_input(target, content, place)

    attempt()
    assert tried > 10
    for path in sorted((FOUND / name).glob("*")):
        assert not try_input(target, path.read_bytes(), place), path


def test_what_was_found_belongs_to_a_parser() -> None:
    assert {path.name for path in FOUND.iterdir()} <= set(TARGETS)
