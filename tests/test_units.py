from __future__ import annotations

import pytest

from megalibi.units import format_bytes, format_count, format_duration


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.96, "1.0k"),
        (12_345, "12.3k"),
        (999_990, "1.0M"),
        (1.3e9, "1.3B"),
        (5e15, "5000.0T"),
        (float("inf"), "inf"),
    ],
)
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (512, "512 B"), (1_234_567_890, "1.2 GB"), (80e9, "80.0 GB")])
def test_bytes(value: float, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59.6, "1m00s"), (190, "3m10s"), (7500, "2h05m"), (370_800, "4d07h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
