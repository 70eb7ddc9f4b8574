"""The memory that a plan says, beside what a measured step held: how far the plan can be trusted on this device."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalibi.config import config_from_dict, derive
from megalibi.errors import ConfigError
from megalibi.plan.memory_trace import MemoryByKind
from megalibi.plan.run_plan import plan_memory


def compare_with_plan(turns: Sequence[Path], device_type: str) -> dict[str, Any]:
    """Return for each turn's file, by its name, the planned and the measured bytes by kind and in all.

    Args:
        turns: From launch/measure_turn.py; those that do not exist are left out.
        device_type: Where they were measured: cuda or cpu.

    Raises:
        ConfigError: None exists.
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
        raise ConfigError(f"none of {', '.join(map(str, turns))} exists: do the steps that measure them first")
    return found
