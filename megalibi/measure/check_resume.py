"""Whether a training that was cut and resumed equals the uninterrupted one to the last bit on this machine."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalibi.checkpoint import CHECKPOINTS, LATEST, list_checkpoints
from megalibi.errors import JobError
from megalibi.metrics.records import StepRecord, read_metrics

COMPARED = ("loss", "grad_norm", "sample_hash")
"""Fields of metrics.jsonl that are compared."""
STEPS = 20
"""Optimizer steps of each training; the resumed one continues from the checkpoint in the middle."""


def check_resume(pretrain: Sequence[str], config: Path, overrides: Sequence[str], scratch: Path) -> dict[str, Any]:
    """Train, then resume a copy of the run from the checkpoint in the middle, and compare the two.

    Args:
        pretrain: The command that starts a training, without its arguments.
        config: The YAML file of the run.
        overrides: ``section.field=value`` strings that win over the file.
        scratch: The folder for both runs; runs that are there already are removed.

    Returns:
        The number of steps, the step that was resumed from, and for each field whether each later step is equal.

    Raises:
        JobError: A training failed.
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
        raise JobError(f"the training in {folder} failed with exit code {code}: see the lines above")


def _later_steps(folder: Path) -> list[StepRecord]:
    return [step for step in read_metrics(folder).steps if step.step > STEPS // 2]
