"""A checkpoint of an earlier version, which commit e4f2636 wrote: it resumes and is evaluated as that commit did.

Its manifest is of format 1, which describes no parameters. tests/checkpoint/e4f2636/make.py says how it was made.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megalibi.checkpoint import Checkpoint
from megalibi.config import Config, save_config
from tests.engine.test_golden import GOLDEN_RELATIVE_BOUND
from tests.support.jobs import LAUNCHER_VARIABLES, SCRIPT, ScriptJob, read_records, torchrun_environment
from tests.support.planted import ROOT
from tests.support.warm_python import warm_python

MADE = Path(__file__).parent / "e4f2636"
CHECKPOINT = MADE / "step_00000003"
EXPECTED = json.loads((MADE / "expected.json").read_text())
SECONDS = 240.0


def resume(config: Config, folder: Path) -> None:
    """Go on from the checkpoint on two ranks, in the folder of the text: that checkpoint knows its text by its path."""
    save_config(config, folder / "config.yaml")
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    inherited |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    ranks = [
        subprocess.Popen(
            [warm_python(), SCRIPT, "--config", "config.yaml", f"checkpoint.resume={CHECKPOINT}"],
            cwd=folder,
            env={**inherited, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in torchrun_environment(2)
    ]
    said = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)


def test_it_resumes_with_the_losses_that_followed(tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(MADE / f"tokens{suffix}", tmp_path)
    old = Checkpoint.open(CHECKPOINT)
    assert old.manifest.format_version == 1
    resume(old.config, tmp_path)
    records = {str(record["step"]): record for record in read_records(tmp_path / "run") if "loss" in record}
    assert list(records) == list(EXPECTED["steps"]) == ["4", "5", "6"]
    for step, expected in EXPECTED["steps"].items():
        assert records[step]["sample_hash"] == expected["sample_hash"]
        for name in ("loss", "grad_norm"):
            assert records[step][name] == pytest.approx(expected[name], rel=GOLDEN_RELATIVE_BOUND, abs=0.0)

    new = Checkpoint.open(tmp_path / "run")  # which has a manifest of today
    assert new.manifest.step == 6
    assert new.manifest.format_version > 1
    assert new.manifest.parameters == old.parameters
    assert list(new.parameters) == list(old.parameters)


@pytest.mark.parametrize("tensor", [1, 2])
def test_it_is_evaluated_to_the_recorded_loss(tmp_path: Path, tensor: int) -> None:
    lengths = list(EXPECTED["losses_by_length"])
    arguments = ["--checkpoint", str(CHECKPOINT), "--data", str(MADE / "tokens"), "--lengths", ",".join(lengths)]
    arguments += ["--tensor-parallel-size", str(tensor), "--output", str(tmp_path / "out.json")]
    environments = torchrun_environment(tensor)
    ScriptJob(ROOT / "tools" / "evaluate.py", [arguments] * tensor, tmp_path, environments).succeed()
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    losses = {str(result["length"]): result["loss"] for result in results}
    assert losses == pytest.approx(EXPECTED["losses_by_length"], rel=GOLDEN_RELATIVE_BOUND, abs=0.0)


def test_what_is_read_of_it_are_numbers_alone() -> None:
    """Not the parameters that DeepSpeed had written, which want gradients and are refused by NumPy."""
    old = Checkpoint.open(CHECKPOINT)
    assert not any(old.read_state().read_whole(name).requires_grad for name in old.parameters)


def test_the_folder_is_small() -> None:
    """It is in every clone."""
    sizes = [path.stat().st_size for path in MADE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert max(sizes) < 100_000
    assert sum(sizes) < 200_000
