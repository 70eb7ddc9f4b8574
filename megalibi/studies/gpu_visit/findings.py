"""What the steps of a visit wrote, read for its page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from megalibi.plan.gpus import GPUS, Gpu
from megalibi.studies.gpu_visit.visit import LOGS_FOLDER, StepRecord

TURNS = ("train_alibi", "train_alibi_long", "train_no_positions", "train_sinusoidal")
ATTENTIONS = ("attention_batch_1", "attention_batch_8", "attention_cuda_graph", "attention_compiled")
TESTS_FILE = "test_gpu.xml"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the steps of a visit wrote, by name; what is missing is None or absent."""

    facts: Mapping[str, Any]
    """What summary.json begins with."""
    records: Sequence[StepRecord]
    ceilings: Mapping[str, Any] | None
    """Of ceilings.py."""
    profile: Mapping[str, Any] | None
    """Of step_profile.py."""
    turns: Mapping[str, Mapping[str, Any]]
    """Of launch/measure_turn.py."""
    attention: Mapping[str, Mapping[str, Any]]
    """Of tools/benchmark_attention.py."""
    plan: Mapping[str, Any] | None = None
    """Of check_plan.py."""
    resume: Mapping[str, Any] | None = None
    """Of check_resume.py."""
    contract: Sequence[str] = ()
    """The lines of its table."""
    failed_tests: Mapping[str, str] = field(default_factory=dict)
    """The first line of what each said, by its name."""

    @property
    def data_sheet(self) -> Gpu | None:
        """What is known of this GPU."""
        return find_data_sheet(str(self.facts.get("hardware", {}).get("gpu", "")))

    def ceiling(self, name: str) -> float | None:
        """Return a measured median, in units a second; None: it was not measured."""
        return None if self.ceilings is None or name not in self.ceilings else self.ceilings[name]["median"] * 1e12


def read_findings(folder: Path, facts: Mapping[str, Any], records: Sequence[StepRecord]) -> Findings:
    """Read what a visit has found so far.

    Args:
        folder: Of the visit.
        facts: What summary.json begins with.
        records: Of all its steps.
    """
    ceilings, plan = _read(folder / "ceilings.json"), _read(folder / "plan.json")
    log = folder / LOGS_FOLDER / "contract.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    last = max((number for number, line in enumerate(lines) if line.startswith("Measured with ")), default=len(lines))
    return Findings(
        facts=facts,
        records=records,
        ceilings=ceilings and ceilings["ceilings"],
        profile=_read(folder / "profile_step.json"),
        turns={name: turn for name in TURNS if (turn := _read(folder / f"{name}.json"))},
        attention={name: record for name in ATTENTIONS if (record := _read(folder / f"{name}.json"))},
        plan=plan and plan["turns"],
        resume=_read(folder / "resume.json"),
        contract=[line for line in lines[last:] if line.startswith("|")],
        failed_tests=_read_failed_tests(folder / TESTS_FILE),
    )


def _read_failed_tests(path: Path) -> dict[str, str]:
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):  # not written yet, or cut off
        return {}
    found = {}
    for case in cases:
        for fault in (*case.iter("failure"), *case.iter("error")):
            found[f"{case.get('classname')}::{case.get('name')}"] = fault.get("message", "").partition("\n")[0]
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def find_data_sheet(name: str) -> Gpu | None:
    """Return the GPU that a driver's name means, as "NVIDIA H100 80GB HBM3"; None: it is not known."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    known = [gpu for gpu in GPUS.values() if set(gpu.name.upper().split("-")) <= words]
    return max(known, key=lambda gpu: gpu.name.count("-"), default=None)
