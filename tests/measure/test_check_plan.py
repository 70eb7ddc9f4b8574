from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megalibi.config import config_to_dict, derive
from megalibi.errors import FileError
from megalibi.measure.check_plan import compare_with_plan
from megalibi.plan.run_plan import plan_memory
from tests.support.steps import make_config


def test_a_turn_is_compared_with_the_plan_of_its_own_run(tmp_path: Path) -> None:
    config = make_config()
    planned = plan_memory(config, derive(config, 1), device_type="cpu")
    measured = dataclasses.replace(planned, activations=planned.activations + planned.total)
    turn = {"config": config_to_dict(config), "ranks": 1, "memory": dataclasses.asdict(measured), "device_bytes": 7}
    path = tmp_path / "train_alibi.json"
    path.write_text(json.dumps(turn))
    found = compare_with_plan([path, tmp_path / "missing.json"], "cpu")
    assert list(found) == ["train_alibi"]
    assert found["train_alibi"]["planned"] == {**dataclasses.asdict(planned), "total": planned.total}
    assert found["train_alibi"]["measured"]["total"] == 2 * planned.total
    assert (found["train_alibi"]["planned_of_measured"], found["train_alibi"]["device_bytes"]) == (0.5, 7)


def test_no_turn_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none of .*missing\.json exists: measure the turns first"):
        compare_with_plan([tmp_path / "missing.json"], "cpu")
