from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megalibi.config import save_config
from megalibi.errors import JobError
from megalibi.measure import check_resume
from megalibi.metrics.records import METRICS_FILE
from tests.support.runs import make_config, write_tokens
from tests.support.warm_python import warm_python

PRETRAIN = Path(__file__).parents[2] / "launch" / "pretrain.py"


def test_a_resumed_training_is_compared_with_the_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run = tmp_path / "run.yaml"
    save_config(make_config(write_tokens(tmp_path, 5000)), run)
    python = warm_python()
    found = check_resume.check_resume([python, str(PRETRAIN)], run, [], tmp_path / "runs")
    assert found["equal"] is True
    assert (found["steps"], found["resumed_from"]) == (20, 10)
    assert found["equal_by_step"] == dict.fromkeys(("loss", "grad_norm", "sample_hash"), [True] * 10)
    assert found["losses"] == found["losses_resumed"]
    assert len(set(found["losses"])) == 10

    with pytest.raises(JobError, match=r"the training in .*whole failed with exit code 2: see the lines above"):
        check_resume.check_resume([python, str(PRETRAIN)], run, ["train.stepz=1"], tmp_path / "runs")


def test_a_difference_is_seen(tmp_path: Path) -> None:
    """A trainer that forgets where it was: its losses after the resume are those of the beginning."""
    forgetful = tmp_path / "forgetful.py"
    forgetful.write_text(
        "import json, sys\nfrom pathlib import Path\n"
        "folder = Path(sys.argv[-1].partition('=')[2])\n"
        "resumed = (folder / 'checkpoints').exists()\n"
        "for step in (10, 20):\n"
        "    (folder / f'checkpoints/step_{step:08d}').mkdir(parents=True, exist_ok=True)\n"
        "    (folder / f'checkpoints/step_{step:08d}/manifest.json').write_text('{}')\n"
        f"record = {json.dumps(STEP)}\n"
        f"with (folder / '{METRICS_FILE}').open('w') as file:\n"
        "    for step in range(1, 21):\n"
        "        loss = 1.0 / (step - 10 if resumed and step > 10 else step)\n"
        "        print(json.dumps({**record, 'step': step, 'loss': loss}), file=file)\n"
    )
    found = check_resume.check_resume([sys.executable, str(forgetful)], tmp_path, [], tmp_path / "runs")
    assert found["equal"] is False
    assert found["equal_by_step"]["grad_norm"] == [True] * 10
    assert found["equal_by_step"]["loss"] == [False] * 10


STEP = {"tokens": 1, "grad_norm": 1.0, "learning_rate": 1.0, "step_seconds": 1.0, "tokens_per_second": 1.0,
        "model_tflops_per_second": 1.0, "model_tflops_per_second_causal": 1.0, "memory_bytes": 1,
        "memory_peak_bytes": 1, "sample_hash": "0"}  # fmt: skip
