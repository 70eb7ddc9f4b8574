"""Trainings under a real SLURM: srun alone, and launch/slurm/pretrain.sbatch as it is shipped, but for its values."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from megalibi.checkpoint import find_checkpoint
from megalibi.config import load_config
from tests.cluster.conftest import HEAD, NODES, Records
from tests.cluster.machines.network import Hosts
from tests.cluster.machines.slurm import DEAD_NODE_SECONDS, GRACE_SECONDS, REQUEUE_SECONDS, Slurm
from tests.cluster.machines.training import ROOT, deepspeed, make_environment, make_job
from tests.support.jobs import SCRIPT, exact_records, last_step, write_job

pytestmark = pytest.mark.cluster

FOREVER = 1_000_000
MORE_STEPS = 20
JOB_SECONDS = 180.0
SIGNAL_SECONDS = 40
"""Before a time limit, at the least, when it is set. SLURM, which looks every 30 s, may signal 50 to 20 s before it."""
NOTICED_SECONDS = 60.0
"""Within which SLURM puts the job of a dead node back into the queue, after it has given the node up."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def started_slurm(network: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(network, HEAD, NODES[:3], tmp_path_factory.mktemp("slurm")) as slurm:
        slurm.environment.update(make_environment())
        yield slurm


@pytest.fixture
def slurm(started_slurm: Slurm) -> Iterator[Slurm]:
    """SLURM with every node idle; the jobs of a test end with it."""
    yield started_slurm
    started_slurm.restore()


def write_project(folder: Path, program: str = "") -> Path:
    """Make a folder that is what a user has cloned and installed.

    Args:
        folder: In which it is made.
        program: What stands in for launch/pretrain.py; "": the real one.
    """
    project = folder / "project"
    (project / "launch").mkdir(parents=True)
    (project / ".venv").symlink_to(sys.prefix)
    for name in ("megalibi", "kernels", "tools", "launch/slurm"):
        (project / name).symlink_to(ROOT / name)
    if program:
        (project / "launch" / "pretrain.py").write_text(program)
    else:
        (project / "launch" / "pretrain.py").symlink_to(SCRIPT)
    return project


def write_script(folder: Path, name: str, options: Mapping[str, str], **values: object) -> Path:
    """Write a shipped script with other values: of its options of sbatch, and of the variables to change."""
    text = (ROOT / "launch" / "slurm" / name).read_text()
    lines = {f"#SBATCH --{option}=": f"#SBATCH --{option}={value}" for option, value in options.items()}
    lines |= {f"{variable}=": f"{variable}={value}" for variable, value in values.items()}
    for begin, line in lines.items():
        text, count = re.subn(rf"^{begin}.*", line, text, flags=re.MULTILINE)
        assert count == 1, begin
    (folder / name).write_text(text)
    return folder / name


def write_pretraining(folder: Path, program: str = "", **options: str) -> Path:
    """Write pretrain.sbatch for a run, with one rank on each of two nodes."""
    small = {"nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "1", "cpus-per-task": "1"} | options
    project = write_project(folder, program)
    return write_script(folder, "pretrain.sbatch", small, CONFIG=folder / "config.yaml", PROJECT=project)


def read_output(script: Path, job: str) -> str:
    """Return what all lives of a job, or of a task of an array, have printed."""
    path = script.parent / f"slurm-{job}.out"
    return path.read_text() if path.exists() else ""


def make_endless_job(folder: Path, **checkpoint: int) -> Path:
    """Write a run that only ``finish_soon`` ends."""
    train = {"steps": FOREVER, "log_every_steps": 500}
    return write_job(folder, train=train, checkpoint={"every_steps": 0} | checkpoint)


def finish_soon(config: Path) -> int:
    """Let the job's next life end some steps after the newest checkpoint; return the number of all steps."""
    newest = find_checkpoint(config.parent / "run" / "checkpoints")
    assert newest is not None
    steps = int(newest.name.removeprefix("step_")) + MORE_STEPS
    config.write_text(config.read_text().replace(f"steps: {FOREVER}\n", f"steps: {steps}\n"))
    return steps


def wait_for_steps(slurm: Slurm, script: Path, job: str, steps: int) -> None:
    run = script.parent / "run"
    slurm.wait_until(lambda: last_step(run) >= steps, JOB_SECONDS, lambda: read_output(script, job))


def test_what_srun_trains_as_one_host_does_is_evaluated_and_converted_by_jobs(
    slurm: Slurm, records_ref: Records, tmp_path: Path
) -> None:
    config = make_job(tmp_path)
    command = ["srun", "--nodes=2", "--ntasks-per-node=2", "python", str(SCRIPT), "--config", str(config)]
    said = slurm.run(*command, folder=tmp_path, timeout=JOB_SECONDS)
    run, result, project = tmp_path / "run", tmp_path / "converted", write_project(tmp_path)
    assert "4 ranks (tensor 2 x data 2" in said
    assert exact_records(run) == records_ref

    options = {"ntasks-per-node": "2", "gpus-per-node": "2", "cpus-per-task": "1"}
    values = {"RUN": run, "DATA": tmp_path / "tokens", "LENGTHS": "33,66", "PROJECT": project}
    evaluation = slurm.submit(write_script(tmp_path, "evaluate.sbatch", options, **values))
    values = {"RUN": run, "RESULT": result, "PROJECT": project}
    conversion = slurm.submit(write_script(tmp_path, "convert.sbatch", {"cpus-per-task": "1"}, **values))
    for job in (evaluation, conversion):
        assert slurm.wait_for(job, ENDED, JOB_SECONDS)["JobState"] == "COMPLETED", read_output(config, job)
    lengths = [entry["length"] for entry in json.loads((run / "evaluation.json").read_text())["results"]]
    assert lengths == [33, 66]
    assert json.loads((result / "config.json").read_text())["architectures"] == ["MptForCausalLM"]


def test_each_task_of_a_sweep_has_its_own_values_and_goes_back_into_the_queue_alone(
    slurm: Slurm, tmp_path: Path
) -> None:
    # Its arguments, and in the first life of the task whose number stands for the whole array, an end by a signal.
    program = """import os, sys
name = "{SLURM_ARRAY_TASK_ID}_{SLURM_RESTART_COUNT}".format_map({"SLURM_RESTART_COUNT": "0"} | os.environ)
open(f"arguments_{name}", "w").write("\\n".join(sys.argv[1:]))
is_whole = os.environ["SLURM_JOB_ID"] == os.environ["SLURM_ARRAY_JOB_ID"]
sys.exit(75 if is_whole and name.endswith("_0") else 0)
"""
    config, project = write_job(tmp_path), write_project(tmp_path, program)
    options = {"array": "0-1", "ntasks-per-node": "1", "gpus-per-node": "1", "cpus-per-task": "1"}
    values = {"CONFIG": config, "PROJECT": project, "OUTPUT": tmp_path / "sweep", "LEARNING_RATES": "(1e-3 2e-3)"}
    script = write_script(tmp_path, "sweep.sbatch", options, **values)
    job = slurm.submit(script)
    tasks = [f"{job}_{number}" for number in range(2)]
    shown = [slurm.wait_for(task, ENDED, JOB_SECONDS) for task in tasks]
    said = [read_output(script, task) for task in tasks]
    assert [task["JobState"] for task in shown] == ["COMPLETED"] * 2, said
    assert sorted((task["JobId"] == job, task["Restarts"]) for task in shown) == [(False, "0"), (True, "1")], said
    for number, rate in enumerate((1e-3, 2e-3)):
        arguments = (project / f"arguments_{number}_0").read_text().split("\n")
        run = load_config(arguments[arguments.index("--config") + 1], arguments[-2:])
        assert run.optimizer.learning_rate == rate
        assert run.train.output_dir == f"{tmp_path}/sweep/learning_rate_{'1e-3' if number == 0 else '2e-3'}"


def test_at_the_time_limit_the_job_saves_and_goes_on_to_an_undisturbed_end(slurm: Slurm, tmp_path: Path) -> None:
    config = make_endless_job(tmp_path)
    script = write_pretraining(tmp_path, signal="B:USR1@20")
    job = slurm.submit(script)
    wait_for_steps(slurm, script, job, 5)
    slurm.end_soon(job, SIGNAL_SECONDS)
    slurm.wait_for_restart(job, JOB_SECONDS)
    steps = finish_soon(config)
    slurm.end_soon(job, 3600)
    shown = slurm.wait_for(job, ENDED, JOB_SECONDS)
    said = read_output(script, job)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), said
    assert said.count(f"stopped by SIGUSR1 after step {steps - MORE_STEPS}, checkpoint saved") == 2
    assert said.count("stopped before its last step: back into the queue") == 1
    assert said.count(f"resumed from {tmp_path}/run/checkpoints/step_{steps - MORE_STEPS:08d}") == 1

    undisturbed = tmp_path / "undisturbed"
    deepspeed(slurm.hosts, {"node1": 1, "node2": 1}, config, f"train.output_dir={undisturbed}").succeed()
    assert len(exact_records(undisturbed)) == steps
    assert exact_records(tmp_path / "run") == exact_records(undisturbed)


def submit_urgent(slurm: Slurm, folder: Path) -> str:
    """Submit a job that preempts all others for a moment; return its number."""
    urgent = folder / "urgent.sh"
    urgent.write_text("#!/bin/bash\nsleep 3\n")
    return slurm.submit(urgent, "--partition=urgent", f"--nodes={len(slurm.nodes)}", "--exclusive")


@pytest.mark.parametrize("partition", ["batch", "spot"])
def test_a_preempted_job_saves_and_goes_on_later(partition: str, slurm: Slurm, tmp_path: Path) -> None:
    config = make_endless_job(tmp_path)
    script = write_pretraining(tmp_path)
    job = slurm.submit(script, f"--partition={partition}")
    wait_for_steps(slurm, script, job, 5)
    urgent_job = submit_urgent(slurm, tmp_path)
    slurm.wait_for_restart(job, GRACE_SECONDS + 30)
    steps = finish_soon(config)
    assert slurm.wait_for(urgent_job, ENDED, JOB_SECONDS)["JobState"] == "COMPLETED"
    shown = slurm.wait_for(job, ENDED, JOB_SECONDS)
    said = read_output(script, job)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), said
    assert said.count(f"stopped by SIGTERM after step {steps - MORE_STEPS}, checkpoint saved") == 2
    assert [record["step"] for record in exact_records(tmp_path / "run")] == list(range(1, steps + 1))


def test_a_job_of_a_partition_that_cancels_is_gone_if_it_does_not_stop_in_time(slurm: Slurm, tmp_path: Path) -> None:
    program = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\n"
    script = write_pretraining(tmp_path, program + "while True:\n    signal.pause()\n")
    job = slurm.submit(script, "--partition=spot")
    slurm.wait_until(lambda: read_output(script, job).count("up") == 2, JOB_SECONDS)
    urgent_job = submit_urgent(slurm, tmp_path)
    shown = slurm.wait_for(job, ("PREEMPTED", *ENDED), GRACE_SECONDS + 60)
    assert slurm.wait_for(urgent_job, ENDED, JOB_SECONDS)["JobState"] == "COMPLETED"
    time.sleep(2 * REQUEUE_SECONDS)
    assert slurm.show(job)["JobState"] == shown["JobState"] == "PREEMPTED", read_output(script, job)


@pytest.mark.parametrize(("dead", "left"), [("node2", "node[1,3]"), ("node1", "node[2-3]")])  # node1 has the script
def test_the_job_of_a_node_that_dies_goes_on_on_another(dead: str, left: str, slurm: Slurm, tmp_path: Path) -> None:
    config = make_endless_job(tmp_path, every_steps=10)
    script = write_pretraining(tmp_path)
    job = slurm.submit(script)
    wait_for_steps(slurm, script, job, 15)
    failures = tmp_path / f"slurm-{job}.failures"
    slurm.wait_until(lambda: not failures.exists(), JOB_SECONDS)  # a life with a new checkpoint is none
    assert slurm.show(job)["NodeList"] == "node[1-2]"
    slurm.hosts.power_off(dead)
    slurm.wait_for_restart(job, DEAD_NODE_SECONDS + NOTICED_SECONDS)
    finish_soon(config)
    shown = slurm.wait_for(job, ENDED, JOB_SECONDS)
    said = read_output(script, job)
    assert (shown["JobState"], shown["Restarts"], shown["NodeList"]) == ("COMPLETED", "1", left), said
    assert ("DUE TO NODE FAILURE" in said) == (dead == "node2")  # srun says it, which died with the script
    assert "resumed from" in said


def test_a_job_that_fails_is_put_back_into_the_queue_so_many_times_only(slurm: Slurm, tmp_path: Path) -> None:
    # In its second life it deletes the failures file, as a training does when a checkpoint is complete.
    program = """import os, signal, sys
path = sys.argv[sys.argv.index("--failures-file") + 1]
if os.environ.get("SLURM_RESTART_COUNT") == "1" and os.environ["SLURM_PROCID"] == "0":
    os.remove(path)
os.kill(os.getpid(), signal.SIGKILL)
"""
    script = write_pretraining(tmp_path, program)
    job = slurm.submit(script)
    shown = slurm.wait_for(job, ENDED, JOB_SECONDS)
    said = read_output(script, job)
    assert (shown["JobState"], shown["Restarts"], shown["ExitCode"]) == ("FAILED", "4", "137:0"), said
    failed = f"error: job {job} failed with code 137"
    assert [line for line in said.splitlines() if line.startswith("error: job")] == [
        f"{failed}, 1 of at most 3 times without a new checkpoint: back into the queue",
        f"{failed} after a new checkpoint: back into the queue",
        f"{failed}, 1 of at most 3 times without a new checkpoint: back into the queue",
        f"{failed}, 2 of at most 3 times without a new checkpoint: back into the queue",
        f"{failed}, 3 times without a new checkpoint: not put back into the queue",
    ]
    # As SLURM does of itself when a node dies.
    slurm.run("scontrol", "requeue", job)
    slurm.wait_for_restart(job, JOB_SECONDS, count=5)
    assert slurm.wait_for(job, ENDED, JOB_SECONDS)["ExitCode"] == "1:0"
    said = read_output(script, job)
    assert f"error: job {job} failed 3 times without a new checkpoint and does not start again" in said


def test_a_mistake_of_the_user_ends_the_job_at_once(slurm: Slurm, tmp_path: Path) -> None:
    config = write_job(tmp_path, train={"steps": 6})
    config.write_text(config.read_text().replace("seq_length:", "seq_lenght:"))
    script = write_pretraining(tmp_path)
    shown = slurm.wait_for(job := slurm.submit(script), ENDED, JOB_SECONDS)
    said = read_output(script, job)
    assert (shown["JobState"], shown["Restarts"], shown["ExitCode"]) == ("FAILED", "0", "2:0"), said
    assert "error: data.seq_lenght is unknown: did you mean data.seq_length?" in said


def test_a_job_that_its_user_cancels_stays_away(slurm: Slurm, tmp_path: Path) -> None:
    # It ends as a training does that a signal has stopped.
    program = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nprint('up', flush=True)\n"
    script = write_pretraining(tmp_path, program + "signal.pause()\n")
    job = slurm.submit(script)
    slurm.wait_until(lambda: read_output(script, job).count("up") == 2, JOB_SECONDS)
    slurm.run("scancel", job)
    assert slurm.wait_for(job, ENDED, JOB_SECONDS)["JobState"] == "CANCELLED"
    time.sleep(2 * REQUEUE_SECONDS)
    shown = slurm.show(job)
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0"), read_output(script, job)
