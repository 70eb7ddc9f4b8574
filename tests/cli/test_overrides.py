"""Values that win over a file may stand on both sides of an option, in every command that takes them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "launch/measure_turn.py": (["--config", "run.yaml"], ["--output", "turn.json"]),
    "launch/pretrain.py": (["--config", "run.yaml"], ["--local_rank", "0"]),
    "launch/profile_step.py": (["--config", "run.yaml"], ["--output", "profile.json"]),
    "tools/compare_1p3b.py": (["--scale", "small"], ["--jobs", "2"]),
    "tools/extrapolate.py": (["study.yaml", "--jobs", "2"], ["--launcher", "srun"]),
    "tools/measure_device.py": (["resume", "--device", "cpu"], ["--output", "resume.json"]),
    "tools/measure_gpu.py": (["--device", "cpu"], ["--only", "machine"]),
    "tools/plan_run.py": (["run.yaml", "--ranks", "2"], ["--gpu", "H100"]),
}
"""What each is given first, and in the midst of its overrides."""


def test_these_are_all_commands_that_take_overrides() -> None:
    scripts = [path for folder in ("launch", "tools", "kernels") for path in (ROOT / folder).rglob("*.py")]
    taking = [path.relative_to(ROOT).as_posix() for path in scripts if "section.field=value" in path.read_text()]
    assert sorted(taking) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_overrides_stand_on_both_sides_of_an_option(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, midst = COMMANDS[command]
    monkeypatch.syspath_prepend(str((ROOT / command).parent))  # as Python does for a script
    monkeypatch.setattr(sys, "argv", [command, *first, "train.steps=4", "zero.stage=1", *midst, "train.seed=5"])
    arguments = runpy.run_path(str(ROOT / command))["parse_arguments"]()
    assert arguments.overrides == ["train.steps=4", "zero.stage=1", "train.seed=5"]
    given = {str(value) for value in vars(arguments).values()}
    assert {word for word in (*first, *midst) if not word.startswith("--")} <= given
