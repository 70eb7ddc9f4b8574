"""Whether a training that was cut and resumed is the one that was not cut, to the last bit, on this machine."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalibi.checkpoint import CHECKPOINTS, LATEST, list_checkpoints
from megalibi.errors import ConfigError
from megalibi.metrics.records import StepRecord, read_metrics

COMPARED = ("loss", "grad_norm", "sample_hash")
STEPS = 20


def check_resume(pretrain: Sequence[str], config: Path, overrides: Sequence[str], scratch: Path) -> dict[str, Any]:
    """Train, go back to the checkpoint in the middle, train on from there, and compare the two.

    Args:
        pretrain: Starts launch/pretrain.py, without its arguments.
        config: YAML of the run.
        overrides: Values that win over it.
        scratch: For both runs; what is there is removed.

    Returns:
        Steps, the step that was gone on from, and for each of the later steps by field whether it is equal.

    Raises:
        ConfigError: A training failed.
    """
    whole, resumed = scratch / "whole", scratch / "resumed"
    for folder in (whole, resumed):
        shutil.rmtree(folder, ignore_errors=True)
    _train(pretrain, config, overrides, whole)
    shutil.copytree(whole, resumed, symlinks=True)
    shutil.rmtree(list_checkpoints(resumed / CHECKPOINTS)[-1])
    (resumed / CHECKPOINTS / LATEST).unlink(missing_ok=True)
    _train(pretrain, config, overrides, resumed)
    again, steps = (_later_steps(folder) for folder in (resumed, whole))
    equal = {
        name: [getattr(a, name) == getattr(b, name) for a, b in zip(again, steps, strict=True)] for name in COMPARED
    }
    return {
        "steps": STEPS,
        "resumed_from": STEPS // 2,
        "equal": all(all(values) for values in equal.values()),
        "equal_by_step": equal,
        "losses": [step.loss for step in steps],
        "losses_resumed": [step.loss for step in again],
    }


def _train(pretrain: Sequence[str], config: Path, overrides: Sequence[str], folder: Path) -> None:
    every = f"checkpoint.every_steps={STEPS // 2}"
    ours = [f"train.steps={STEPS}", every, "checkpoint.keep=3", "train.log_every_steps=1", f"train.output_dir={folder}"]
    command = [*pretrain, "--config", str(config), *overrides, *ours]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise ConfigError(f"the training in {folder} failed with exit code {code}: see the lines above")


def _later_steps(folder: Path) -> list[StepRecord]:
    return [step for step in read_metrics(folder).steps if step.step > STEPS // 2]
