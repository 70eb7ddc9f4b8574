from __future__ import annotations

import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megalibi.checkpoint import find_checkpoint
from megalibi.config import Config, load_config
from megalibi.errors import ConfigError, FileError, JobError
from megalibi.studies.machinery.machine import COMMAND_SCRIPT, Machine, detect_machine
from megalibi.studies.machinery.trainings import Training, find_divergence, run_trainings
from tests.support.diverged import write_divergence
from tests.support.jobs import run_job, write_job


def make_machine(**changes: Any) -> Machine:
    return Machine(**({"environment": {"HOME": "/h"}, "cores": 8} | changes))


def test_this_machine_starts_the_packages_commands() -> None:
    machine = detect_machine({"OMP_NUM_THREADS": "3"}, jobs=1, ranks=1, launcher="srun -n '2' python")
    assert machine.start("evaluate") == [sys.executable, COMMAND_SCRIPT, "evaluate"]
    assert machine.launcher == ("srun", "-n", "2", "python")
    assert machine.environment_of(0, 1)["OMP_NUM_THREADS"] == "3"
    assert machine.cores >= 1


def change(config: Config, section: str, **fields: Any) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of 6 steps, checkpoints at 4 and 6, started by hand."""
    folder = tmp_path_factory.mktemp("study")
    run_job(write_job(folder))
    return folder


@pytest.fixture
def training(finished: Path, tmp_path: Path) -> Training:
    """The run in a folder that a test may damage."""
    shutil.copytree(finished / "run", tmp_path / "run")
    config = change(load_config(finished / "config.yaml"), "train", output_dir=str(tmp_path / "run"))
    return Training(config=config, machine=make_machine())


def test_a_run_started_by_hand_is_finished(training: Training) -> None:
    found = training.find_finished()
    assert found is not None
    assert found.name == "step_00000006"
    assert training.finish(1) is None  # a launcher's exit code says nothing


def test_trained_runs_start_no_process(training: Training) -> None:
    run_trainings([training], Console(quiet=True))
    assert not training.log.exists()
    assert not training.config_path.exists()


def test_no_run_yet_is_unfinished(training: Training, tmp_path: Path) -> None:
    new = Training(config=change(training.config, "train", output_dir=str(tmp_path / "new")), machine=training.machine)
    assert new.find_finished() is None
    assert new.finish(2) == "failed with exit code 2"
    assert new.finish(0) == "was stopped before its last step"
    assert new.progress() is None


def test_progress_is_that_of_the_metrics(training: Training) -> None:
    with (training.folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 7, "torn')
    progress = training.progress()
    assert progress is not None
    assert (progress.done, progress.total) == (6, 6)
    assert progress.words.startswith("step 6/6 | loss ")


@pytest.mark.parametrize("damage", ["flipped byte", "missing file", "manifest"])
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_counts(training: Training, damage: str) -> None:
    checkpoint = training.find_finished()
    assert checkpoint is not None
    path = checkpoint / ("manifest.json" if damage == "manifest" else "weights_tensor_00_data_0000.safetensors")
    if damage == "missing file":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert training.find_finished() is None
    assert (checkpoint.parent / "step_00000006.damaged").is_dir()
    left = find_checkpoint(checkpoint.parent)
    assert left is not None
    assert left.name == "step_00000004"


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("train", {"steps": 9}, "train.steps=9, not 6;"),
        ("model", {"init_std": 0.03}, "model.init_std=0.03, not 0.05;"),
        ("optimizer", {"learning_rate": 1e-4}, "optimizer.learning_rate=0.0001, not 0.003;"),
    ],
)
def test_another_configuration_is_refused_and_named(
    training: Training, section: str, fields: dict[str, Any], message: str
) -> None:
    changed = Training(config=change(training.config, section, **fields), machine=training.machine)
    with pytest.raises(ConfigError) as error:
        run_trainings([changed], Console(quiet=True))
    assert f"was trained with another configuration than this study's: {message}" in str(error.value)
    assert training.find_finished() is not None


def test_what_changes_no_weight_may_change(training: Training) -> None:
    config = change(training.config, "train", log_every_steps=3, eval_samples=9)
    config = change(config, "checkpoint", every_steps=1, keep=9)
    assert Training(config=config, machine=training.machine).find_finished() is not None


def test_everything_is_checked_before_anything_starts(training: Training, tmp_path: Path) -> None:
    good = Training(
        config=change(training.config, "train", output_dir=str(tmp_path / "good")), machine=training.machine
    )
    bad = Training(
        config=change(change(training.config, "train", output_dir=str(tmp_path / "bad")), "train", global_batch_size=5),
        machine=training.machine,
    )
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=5: must be a multiple"):
        run_trainings([good, bad], Console(quiet=True))
    assert not good.log.exists()


def test_a_failed_training_names_its_log_and_the_last_words(training: Training, tmp_path: Path) -> None:
    machine = make_machine(launcher=(sys.executable, "-c", "print('error: no GPU today'); raise SystemExit(1)"))
    config = change(training.config, "train", output_dir=str(tmp_path / "new"))
    with pytest.raises(JobError, match=r"^new failed with exit code 1: no GPU today \(log .*/new\.log\)$"):
        run_trainings([Training(config=config, machine=machine)], Console(quiet=True))
    assert load_config(tmp_path / "new.yaml") == config  # what a user can start by hand


def make_diverging(training: Training, tmp_path: Path, **fields: Any) -> Training:
    config = change(training.config, "train", output_dir=str(tmp_path / "high"), **fields)
    config = change(config, "optimizer", learning_rate=1e30, min_learning_rate=1e30)
    return Training(config=config, machine=make_machine(), may_diverge=True)


def test_a_rate_on_trial_may_diverge_and_does_so_once(
    training: Training, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    high = make_diverging(training, tmp_path, on_nonfinite="skip", max_consecutive_skips=1)
    assert not high.has_ended()
    run_trainings([high], Console(quiet=True))
    step = find_divergence(high.config)
    assert step is not None
    assert f"high has diverged at step {step}" in caplog.messages
    assert high.has_ended()
    begun = high.log.read_text()
    said = io.StringIO()
    run_trainings([training, high], Console(file=said))
    assert high.log.read_text() == begun
    assert said.getvalue() == (
        "trained already: run\n"
        f"high has diverged at step {step}, and is not trained again; to try it once more delete "
        f"{high.folder / 'diverged.json'}\n"
    )
    assert not dataclasses.replace(high, may_diverge=False).has_ended()

    other = dataclasses.replace(high, config=change(high.config, "model", init_std=0.03))
    with pytest.raises(ConfigError, match=r"high has diverged with another configuration than this study's: model\."):
        other.has_ended()
    longer = dataclasses.replace(high, config=change(high.config, "train", max_consecutive_skips=9))
    with pytest.raises(ConfigError, match=r": train\.max_consecutive_skips=9, not 1;"):  # it might have gone on
        longer.has_ended()
    (high.folder / "diverged.json").unlink()
    assert not high.has_ended()


def test_a_run_has_diverged_where_it_says_so_whatever_its_last_loss_is(training: Training) -> None:
    metrics = training.folder / "metrics.jsonl"
    last = json.loads(metrics.read_text().splitlines()[-1])
    with metrics.open("a") as file:  # a step that was left out, where a signal has stopped the run
        file.write(json.dumps(last | {"step": 7, "grad_norm": "Infinity", "skipped": True}) + "\n")
    assert find_divergence(training.config) is None
    write_divergence(training.config, 9)
    assert find_divergence(training.config) == 9
    (training.folder / "diverged.json").write_text("{}")
    with pytest.raises(FileError, match=r"diverged\.json: has no step; delete it to train that run again"):
        find_divergence(training.config)


def test_one_rank_is_plain_python_and_several_are_deepspeeds() -> None:
    assert make_machine().launch(0, "pretrain") == [sys.executable, COMMAND_SCRIPT, "pretrain"]
    two = make_machine(ranks=2).launch(0, "study", "measure-turn")
    assert two[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert two[two.index("--num_accelerators") + 1] == "2"
    assert two[-3:] == [COMMAND_SCRIPT, "study", "measure-turn"]
    launches = [make_machine(ranks=2).launch(slot, "pretrain") for slot in range(2)]
    ports = {launch[launch.index("--master_port") + 1] for launch in launches}
    assert len(ports) == 2  # launchers side by side do not meet


@pytest.mark.parametrize("launcher", ["srun -n 2 python", "torchrun --nproc_per_node 2", "deepspeed --num_gpus 2"])
def test_a_launcher_of_the_users_gets_a_script(launcher: str) -> None:
    words = tuple(launcher.split())
    assert make_machine(launcher=words).launch(0, "pretrain") == [*words, COMMAND_SCRIPT, "pretrain"]


def test_processes_share_cores_and_gpus() -> None:
    assert make_machine(jobs=2).environment_of(1, 1) == {"HOME": "/h", "OMP_NUM_THREADS": "4"}
    assert make_machine(jobs=2, ranks=2).environment_of(0, 2)["OMP_NUM_THREADS"] == "2"
    assert make_machine(jobs=9).environment_of(0, 1)["OMP_NUM_THREADS"] == "1"
    assert make_machine(environment={"OMP_NUM_THREADS": "3"}).environment_of(0, 1)["OMP_NUM_THREADS"] == "3"
    assert make_machine(gpus=2, jobs=2).environment_of(1, 1)["CUDA_VISIBLE_DEVICES"] == "1"
    shown = {"CUDA_VISIBLE_DEVICES": "5,7"}
    assert make_machine(gpus=2, jobs=2, environment=shown).environment_of(1, 1)["CUDA_VISIBLE_DEVICES"] == "7"
    launch = make_machine(gpus=4, jobs=2, ranks=2).launch(1, "pretrain")
    assert launch[launch.index("--include") + 1] == "localhost:2,3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jobs": 0}, "--jobs=0: must be at least 1"),
        ({"ranks": 0}, "study.ranks=0: must be at least 1"),
        ({"gpus": 3, "jobs": 2, "ranks": 2}, "need 4 GPUs, and there are 3"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_machine(**changes)
