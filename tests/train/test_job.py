from __future__ import annotations

from megalibi.train.job import is_due


def test_every_so_many_steps() -> None:
    assert [step for step in range(1, 10) if is_due(step, 3)] == [3, 6, 9]
    assert not any(is_due(step, 0) for step in range(1, 10))
