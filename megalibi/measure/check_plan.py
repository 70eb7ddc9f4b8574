"""Planned memory beside the memory of measured steps: how far the plan of a run can be trusted on this device."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalibi.config import config_from_dict, derive
from megalibi.errors import FileError
from megalibi.plan.memory_trace import MemoryByKind
from megalibi.plan.run_plan import plan_memory


def compare_with_plan(turns: Sequence[Path], device_type: str) -> dict[str, Any]:
    """Return the planned and the measured bytes of each turn, by kind and in total, by the name of the turn's file.

    Args:
        turns: Outputs of ``megalibi study measure-turn``; those that do not exist are left out.
        device_type: Where they were measured: cuda or cpu.

    Raises:
        FileError: None of the files exists.
    """
    found = {}
    for path in turns:
        if path.exists():
            turn = json.loads(path.read_text(encoding="utf-8"))
            config = config_from_dict(turn["config"])
            planned = plan_memory(config, derive(config, turn["ranks"]), device_type=device_type)
            measured = MemoryByKind(**turn["memory"])
            found[path.stem] = {
                "planned": {**dataclasses.asdict(planned), "total": planned.total},
                "measured": {**dataclasses.asdict(measured), "total": measured.total},
                "device_bytes": turn["device_bytes"],
                "planned_of_measured": planned.total / measured.total,
            }
    if not found:
        raise FileError(f"none of {', '.join(map(str, turns))} exists: measure the turns first")
    return found
