"""What the steps of a visit have written, read for the visit's page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from megalibi.plan.gpus import GPUS, Gpu
from megalibi.studies.gpu_visit.step import LOGS_FOLDER, StepOutcome

TURNS = ("train_alibi", "train_alibi_long", "train_no_positions", "train_sinusoidal")
ATTENTIONS = ("attention_batch_1", "attention_batch_8", "attention_cuda_graph", "attention_compiled")
TESTS_FILE = "test_gpu.xml"


@dataclass(frozen=True, kw_only=True)
class VisitResults:
    """What the steps of a visit have written; what is missing is None or left out."""

    facts: Mapping[str, Any]
    """Machine, versions, commit and date, with which summary.json begins."""
    outcomes: Sequence[StepOutcome]
    """What came of each step."""
    ceilings: Mapping[str, Any] | None
    """Ceilings by name, from measure/ceilings.py."""
    profile: Mapping[str, Any] | None
    """The profile of a step, from measure/step_profile.py."""
    turns: Mapping[str, Mapping[str, Any]]
    """Turns by the name of their step, from measure/turn.py."""
    attention: Mapping[str, Mapping[str, Any]]
    """Records of tools/benchmark_attention.py by the name of their step."""
    plan: Mapping[str, Any] | None = None
    """Planned and measured memory by the name of a turn's step, from measure/check_plan.py."""
    resume: Mapping[str, Any] | None = None
    """Whether a resumed training equals the whole one, from measure/check_resume.py."""
    contract: Sequence[str] = ()
    """The lines of the table of the exactness contract."""
    failed_tests: Mapping[str, str] = field(default_factory=dict)
    """Name of a failed test -> the first line of its message."""

    @property
    def data_sheet(self) -> Gpu | None:
        """The data sheet of this GPU, if it is known."""
        return find_data_sheet(str(self.facts.get("hardware", {}).get("gpu", "")))

    def ceiling(self, name: str) -> float | None:
        """Return the median of a ceiling in FLOP/s or bytes/s, or None if it was not measured."""
        return None if self.ceilings is None or name not in self.ceilings else self.ceilings[name]["median"] * 1e12


def read_visit_results(folder: Path, facts: Mapping[str, Any], outcomes: Sequence[StepOutcome]) -> VisitResults:
    """Read the results that a visit has so far.

    Args:
        folder: The folder that the visit writes to.
        facts: Machine, versions, commit and date, with which summary.json begins.
        outcomes: What came of each step.
    """
    ceilings, plan = _read(folder / "ceilings.json"), _read(folder / "plan.json")
    log = folder / LOGS_FOLDER / "contract.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    last = max((number for number, line in enumerate(lines) if line.startswith("Measured with ")), default=len(lines))
    return VisitResults(
        facts=facts,
        outcomes=outcomes,
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
    """Return the GPU that a driver calls by a name such as "NVIDIA H100 80GB HBM3", or None if it is not known."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    known = [gpu for gpu in GPUS.values() if set(gpu.name.upper().split("-")) <= words]
    return max(known, key=lambda gpu: gpu.name.count("-"), default=None)
