from __future__ import annotations

import random

import pytest

from megalibi.config import config_from_dict, config_to_dict, load_config, save_config
from megalibi.config.sample_ranges import SampleRanges
from megalibi.errors import ConfigError
from tests.support.runs import make_config


def list_numbers(ranges: SampleRanges) -> list[int]:
    return [number for first, last in ranges.ranges for number in range(first, last + 1)]


def test_ranges_are_what_the_list_of_their_numbers_is() -> None:
    """Against lists, for ranges that overlap, touch and stand in any order."""
    draw = random.Random(0)
    for _ in range(200):
        pairs = [(first, first + draw.randrange(5)) for first in draw.choices(range(40), k=draw.randrange(6))]
        ranges = SampleRanges.parse([str(a) if a == b else f"{a}-{b}" for a, b in pairs])
        numbers = sorted({number for first, last in pairs for number in range(first, last + 1)})
        assert list_numbers(ranges) == numbers
        assert SampleRanges.parse(ranges.spell()) == ranges
        assert all(b > a + 1 for (_, a), (b, _) in zip(ranges.ranges, ranges.ranges[1:], strict=False))
        kept = [number for number in range(200) if number not in numbers]
        assert [ranges.number_at(position) for position in range(100)] == kept[:100]
        position, count, limit = draw.randrange(50), draw.randrange(1, 30), draw.randrange(50)
        assert list_numbers(ranges.kept(position, count)) == kept[position : position + count]
        assert list_numbers(ranges.below(limit)) == [number for number in numbers if number < limit]
        other = SampleRanges.of([(limit, limit + 3)])
        assert list_numbers(ranges | other) == sorted({*numbers, *range(limit, limit + 4)})


@pytest.mark.parametrize("text", ["", "a", "5-4", "-3", "1-2-3", "1.5", "9223372036854775807", "1 - 2"])
def test_what_is_no_range_is_refused_by_its_place(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make_config("tokens", data={"skip": ["0-3", text]})
    expected = (
        f"data.skip[1]={text}: must be FIRST-LAST, the numbers of the first and the last sample that are left out"
    )
    assert str(refused.value) == expected


def test_what_the_log_says_can_be_typed(tmp_path) -> None:
    config = make_config("tokens", data={"skip": ["128-135", "400"]})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(config_to_dict(config)) == config
    typed = f"data.skip={SampleRanges.parse(config.data.skip)}"
    assert typed == "data.skip=[128-135,400]"
    save_config(make_config("tokens"), tmp_path / "without.yaml")
    assert load_config(tmp_path / "without.yaml", [typed]) == config
    assert load_config(tmp_path / "config.yaml", ["data.skip=[]"]) == make_config("tokens")
