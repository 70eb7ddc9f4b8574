"""Turns of a small comparison, and the records that they would have written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from megalibi.config import Config, config_to_dict
from megalibi.plan.memory_trace import MemoryByKind
from megalibi.studies.comparison.study import ComparedModel, CompareStudy, Variant
from megalibi.studies.comparison.turns import Turn, plan_turns
from megalibi.studies.machinery.machine import Machine
from tests.support.runs import make_config

STUDY = CompareStudy(lengths=(16, 32), turns=3, warm_steps=1, steps_per_turn=2, valid_tokens=1000)
FAST, SLOW = (
    Variant(model=ComparedModel(method="alibi", length=16), attention="fast"),
    Variant(model=ComparedModel(method="sinusoidal", length=32), attention="fast"),
)
HARDWARE = {"cpu": "a CPU", "cores": 2, "threads": 1, "memory_bytes": 1}


def make_turns(folder: Path, study: CompareStudy = STUDY, **sections: Any) -> dict[Variant, list[Turn]]:
    train = {"output_dir": str(folder), "global_batch_size": 4, "eval_samples": 4}
    base = make_config("tokens", data={"seq_length": 32, "valid": "tokens"}, train=train, **sections)
    machine = Machine(environment={}, cores=4, jobs=2)
    return plan_turns(base, study, machine)


def memory_of(weights: int) -> MemoryByKind:
    return MemoryByKind(weights=weights, gradients=2, optimizer_states=3, activations=4, attention_workspace=5, other=6)


def record_of(config: Config, seconds: list[float], *, weights: int = 1, **changes: Any) -> dict[str, Any]:
    record = {"step_seconds": seconds, "device_bytes": 100 * weights, "memory": dataclasses.asdict(memory_of(weights))}
    return {**record, "config": config_to_dict(config), "ranks": 1, "hardware": HARDWARE, "commit": "abc", **changes}


def write_turn(turn: Turn, seconds: list[float], **changes: Any) -> None:
    turn.folder.mkdir(parents=True, exist_ok=True)
    turn.output.write_text(json.dumps(record_of(turn.config, seconds, **changes)))
