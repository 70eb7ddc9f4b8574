from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from megalibi.errors import ConfigError
from megalibi.studies.comparison.measured_code import Code, check_same_code

ABC, DIRTY, DOCS = (
    Code.of({"commit": commit, "code": sha256})
    for commit, sha256 in (("abc", "1" * 64), ("abc-dirty", "2" * 64), ("def", "1" * 64))
)
OLD, OLD_DIRTY, OLD_OTHER = (Code.of({"commit": commit}) for commit in ("abc", "abc-dirty", "def"))


def test_code_is_told_apart_by_its_checksum_and_by_the_commit_where_there_is_none() -> None:
    names = {"abc": ABC, "dirty": DIRTY, "docs": DOCS, "old": OLD, "old dirty": OLD_DIRTY, "old other": OLD_OTHER}
    differ = {(a, b) for a, b in itertools.combinations(names, 2) if not names[a].is_same(names[b])}
    assert differ == {
        ("abc", "dirty"),  # sources that are not committed
        ("dirty", "docs"),
        ("abc", "old other"), ("dirty", "old other"), ("docs", "old"), ("docs", "old dirty"),
        ("old", "old other"), ("old dirty", "old other"),
    }  # fmt: skip
    assert Code.of({}) == Code(commit="unknown", sha256="")


def test_any_two_turns_of_different_code_are_refused() -> None:
    files = [Path(f"runs/speed/alibi_16_fast/turn_{n}.json") for n in (1, 2, 3)]
    check_same_code(dict(zip(files, (ABC, DOCS, ABC), strict=True)))
    check_same_code(dict(zip(files, (ABC, DOCS, ABC), strict=True)), DOCS)
    with pytest.raises(ConfigError) as refusal:
        check_same_code(dict(zip(files, (OLD, ABC, DIRTY), strict=True)))  # each is of the first one's commit
    assert str(refusal.value) == (
        f"{files[1]} was measured with code 111111111111 of commit abc, another turn with code 222222222222 of commit "
        "abc, and turns of different code cannot be compared: go back to code 111111111111 of commit abc, give another "
        "train.output_dir, or delete runs/speed to measure all of them anew"
    )
    with pytest.raises(ConfigError, match="was measured with commit def, what is missing would be measured with code"):
        check_same_code({files[0]: OLD_OTHER}, ABC)
