"""Values that win over a file may stand on both sides of an option, in every command that takes them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from megalibi.cli.command import spell_command
from megalibi.cli.main import COMMANDS, load_command

ROOT = Path(__file__).parents[2]
TAKING = {
    "pretrain": (["--config", "run.yaml"], ["--local_rank", "0"]),
    "plan": (["run.yaml", "--ranks", "2"], ["--gpu", "H100"]),
    "checkpoint": (["show", "runs/a", "--config", "run.yaml"], ["--json", "checkpoint.json"]),
    "study compare-1p3b": (["--scale", "small"], ["--jobs", "2"]),
    "study extrapolate": (["study.yaml", "--jobs", "2"], ["--launcher", "srun"]),
    "study measure-device": (["resume", "--device", "cpu"], ["--output", "resume.json"]),
    "study measure-gpu": (["--device", "cpu"], ["--only", "machine"]),
    "study measure-turn": (["--config", "run.yaml"], ["--output", "turn.json"]),
    "study profile-step": (["--config", "run.yaml"], ["--output", "profile.json"]),
}
"""What each is given first, and in the midst of its overrides."""


def takes_overrides(name: str) -> bool:
    parser = argparse.ArgumentParser()
    load_command(name).add_arguments(parser)
    return any(action.dest == "overrides" for action in parser._actions)


def test_these_are_all_commands_that_take_overrides() -> None:
    assert sorted(filter(takes_overrides, COMMANDS)) == sorted(TAKING)


def test_no_script_takes_overrides_in_its_own_way() -> None:
    """Those of launch/ and tools/ that take them stand for commands."""
    scripts = [path for place in ("launch", "tools", "kernels") for path in (ROOT / place).rglob("*.py")]
    parsing = [path for path in scripts if "ArgumentParser(" in path.read_text(encoding="utf-8")]
    assert len(parsing) > 5
    words = re.compile(r"overrides|section\.field|parse_known_args|parse_intermixed_args")
    assert [path for path in parsing if words.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("name", TAKING)
def test_overrides_stand_on_both_sides_of_an_option(name: str) -> None:
    first, midst = TAKING[name]
    words = [*first, "train.steps=4", "zero.stage=1", *midst, "train.seed=5"]
    arguments = load_command(name).parse(words, spell_command(name))
    assert arguments.overrides == ["train.steps=4", "zero.stage=1", "train.seed=5"]
    given = {str(value) for value in vars(arguments).values()}
    assert {word for word in (*first, *midst) if not word.startswith("--")} <= given
