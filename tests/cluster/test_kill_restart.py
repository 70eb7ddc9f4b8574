from __future__ import annotations

from pathlib import Path

from tests.cluster.kill_restart import kill_and_restart

KILLS = 4


def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    result = kill_and_restart(tmp_path, KILLS)
    assert sum(result["killed_while"].values()) == len(result["resumed_from_steps"]) == KILLS
    assert result["resumed_from_steps"] == sorted(result["resumed_from_steps"])
    assert result["resumed_from_steps"][0] > 0
