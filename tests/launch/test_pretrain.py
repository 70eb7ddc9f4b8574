from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megalibi.checkpoint import find_checkpoint
from megalibi.data.preprocess import preprocess
from megalibi.data.tokenizer.training import train_tokenizer
from tests.support.jobs import (
    LAUNCHER_VARIABLES,
    POLL_SECONDS,
    SCRIPT,
    Job,
    exact_records,
    last_step,
    run_job,
    write_job,
)
from tests.support.ranks import find_free_port
from tests.support.warm_python import warm_python

LAUNCHER_TIMEOUT_SECONDS = 240.0
TENSOR_2 = "parallel.tensor_parallel_size=2"
FOREVER = "train.steps=1000000"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration, and beside it a finished run of one rank and files that are not what they should be."""
    folder = tmp_path_factory.mktemp("job")
    config = write_job(folder)
    run_job(config)
    for suffix in (".bin", ".idx"):
        shutil.copy(folder / f"tokens{suffix}", folder / f"short{suffix}")
        shutil.copy(folder / f"tokens{suffix}", folder / f"foreign{suffix}")
    os.truncate(folder / "short.bin", 100)
    (folder / "foreign.idx").write_bytes(b"PNG" * 100)
    train_tokenizer([Path(__file__).read_text()], 600, folder / "large.model")
    text = Path(__file__).read_text()
    train_tokenizer([text], 400, folder / "small.model")
    train_tokenizer([text * 2], 401, folder / "other.model")
    (folder / "text.txt").write_text(text)
    for tokenizer, name in (("small", "recorded"), ("other", "other"), ("small", "remade")):
        preprocess(
            [str(folder / "text.txt")], tokenizer_path=str(folder / f"{tokenizer}.model"), output=str(folder / name)
        )
    shutil.copy(folder / "other.json", folder / "remade.json")
    return config


BAD_INPUT = {
    "unknown key": ("model.hiden_size=48", "model.hiden_size is unknown: did you mean model.hidden_size?"),
    "no value": ("model", "override 'model': must be section.field=value"),
    "type": ("train.steps=a", "train.steps='a': must be a whole number"),
    "heads": ("model.num_attention_heads=5", "model.num_attention_heads=5: must divide model.hidden_size=48"),
    "batch": (
        "train.global_batch_size=5",
        "train.global_batch_size=5: must be a multiple of 2 (train.micro_batch_size=2 x 1 data-parallel rank)",
    ),
    "tensor": ("parallel.tensor_parallel_size=2", "parallel.tensor_parallel_size=2: must divide the job's 1 rank"),
    "missing tokens": ("data.train={folder}/none", "none.idx: no such token file"),
    "missing valid": ("data.valid={folder}/none", "none.idx: no such token file"),
    "truncated tokens": ("data.train={folder}/short", "short.bin: truncated, 100 bytes of the 40000"),
    "foreign tokens": ("data.train={folder}/foreign", "foreign.idx: not a Megatron-LM index"),
    "ids": ("model.vocab_size=100", "past vocab_size=100"),
    "no tokenizer": ("data.tokenizer={folder}/none.model", "none.model: no such tokenizer"),
    "large tokenizer": (
        "data.tokenizer={folder}/large.model",
        "model.vocab_size=509: must be at least 600, the number of ids of data.tokenizer={folder}/large.model",
    ),
    "small tokenizer": ("data.tokenizer={folder}/small.model", "past vocab_size=400; the file was made with another"),
    "other tokenizer": (
        "data.train={folder}/recorded data.tokenizer={folder}/other.model",
        "recorded was made with another tokenizer: data.tokenizer={folder}/other.model (sha256 ",
    ),
    "two tokenizers": (
        "data.train=[{folder}/recorded,{folder}/other]",
        "other was made with another tokenizer: {folder}/small.model in {folder}/recorded.json (sha256 ",
    ),
    "tokens of another record": ("data.train={folder}/remade", "remade.json describes another token file than the one"),
    "long name": ("data.tokenizer=" + "n" * 300, "nnn...: File name too long"),
    "unknown back end": ("model.attention_backend=nope", "model.attention_backend=nope cannot be used: backend='nope'"),
    "no checkpoint": ("checkpoint.resume={folder}/none", "none is no complete checkpoint"),
}  # fmt: skip


def assert_refused(job: Job, message: str) -> None:
    """Every rank ends with 2, and rank 0 alone says why, in one line."""
    assert set(job.wait()) == {2}, job.output
    (line,) = job.read_log(0).splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not any(job.read_log(rank) for rank in range(1, len(job.logs)))


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2_and_creates_nothing(config: Path, case: str) -> None:
    override, message = BAD_INPUT[case]
    target = config.parent / "new"
    job = Job(config, *override.format(folder=config.parent).split(), f"train.output_dir={target}")
    assert_refused(job, message.format(folder=config.parent))
    assert not target.exists()


def test_ranks_refuse_together_and_speak_once(config: Path) -> None:
    target = f"train.output_dir={config.parent}/new"
    job = Job(config, "model.padded_vocab_size=511", TENSOR_2, target, world_size=2)
    assert_refused(job, "parallel.tensor_parallel_size=2: must divide model.padded_vocab_size=511")
    job = Job(config, "train.global_batch_size=6", target, world_size=2)
    assert_refused(
        job,
        "train.global_batch_size=6: must be a multiple of 4 (train.micro_batch_size=2 x 2 data-parallel ranks)",
    )
    assert not (config.parent / "new").exists()


@pytest.mark.parametrize(
    ("name", "world_size", "message"),
    [
        ("tokens.bin", 2, "tokens.bin cannot be written: {folder}/tokens.bin is no folder"),
        ("tokens.bin/runs/new", 1, "tokens.bin/runs/new cannot be written: {folder}/tokens.bin is no folder"),
        ("n" * 300, 1, "nnn cannot be written: File name too long"),
    ],
)
def test_a_folder_that_cannot_be_written_is_said_before_the_work_by_one_rank(
    config: Path, name: str, world_size: int, message: str
) -> None:
    before = contents(config.parent / "run")
    job = Job(config, f"train.output_dir={config.parent}/{name}", world_size=world_size)
    assert_refused(job, message.format(folder=config.parent))
    assert contents(config.parent / "run") == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layers=3", "model.num_layers=3: must be 2, the value in the checkpoint"),
        ("train.seed=5", "train.seed=5: must be 1234, the value in the checkpoint"),
        ("checkpoint.resume=none", "checkpoint.resume=none: must be auto, since "),
    ],
)
def test_a_run_that_does_not_fit_its_checkpoints_is_refused_and_left_alone(
    config: Path, override: str, message: str
) -> None:
    before = contents(config.parent / "run")
    assert_refused(Job(config, override), message)
    assert contents(config.parent / "run") == before


def test_a_missing_configuration_is_one_line(tmp_path: Path) -> None:
    assert_refused(Job(tmp_path / "none.yaml"), "none.yaml cannot be read: No such file or directory")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12\n", "is not a configuration: it must be a mapping of model, data"),
        ("model: !!set {num_layers}\n", "is not a valid configuration: line 1: the tag !!set must be left out"),
        (
            "model: " + "[" * 2000 + "]" * 2000,
            "is not a valid configuration: values must be nested at most 32 levels deep",
        ),
        (
            "model: {num_layers: " + "7" * 5001 + "}\n",
            "... (5,001 characters): must be a whole number of at most",
        ),
        ("model: {num_layers: '???'}\n", "model.num_layers is missing, its value is ???"),
    ],
)
def test_a_hostile_configuration_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert_refused(Job(tmp_path / "config.yaml"), message)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def launch(*command: str) -> subprocess.Popen[str]:
    """Start a real launcher, in a session of its own as a scheduler does."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def deepspeed(config: Path, *overrides: str, port: int = 0) -> subprocess.Popen[str]:
    options = ["--num_gpus", "2", "--master_port", str(port or find_free_port())]
    python = [warm_python(), "-m", "deepspeed.launcher.runner"]
    return launch(*python, *options, str(SCRIPT), "--config", str(config), *overrides)


def torchrun(config: Path, *overrides: str) -> subprocess.Popen[str]:
    options = ["--nproc_per_node", "2", "--master_port", str(find_free_port())]
    python = [warm_python(), "-m", "torch.distributed.run"]
    return launch(*python, *options, str(SCRIPT), "--config", str(config), *overrides)


def test_a_port_in_use_is_one_line_under_deepspeed(config: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        process = deepspeed(config, f"train.output_dir={config.parent}/new", port=port)
        _, errors = process.communicate(timeout=LAUNCHER_TIMEOUT_SECONDS)
    assert process.returncode != 0
    (line,) = [line for line in errors.splitlines() if line.startswith("error: port ")]
    assert line.startswith(
        f"error: port {port} of {socket.gethostname()} is in use, perhaps by another run: start with"
    )


def session_is_empty(session: int) -> bool:
    """Return whether no process of a session runs any more; zombies, which nobody waits for in a container, do not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            return False
    return True


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LAUNCHER_TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(POLL_SECONDS)


def slurm_environments(world_size: int) -> list[dict[str, str]]:
    """Return what srun tells each of its tasks on one host, with the address a batch script exports."""
    job = str(find_free_port() % 20_000)
    return [
        {"SLURM_JOB_ID": job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
         "SLURM_STEP_NUM_TASKS": str(world_size), "SLURM_STEP_TASKS_PER_NODE": str(world_size),
         "MASTER_ADDR": "127.0.0.1"}
        for rank in range(world_size)
    ]  # fmt: skip


def test_every_launcher_trains_the_same_and_sigterm_to_deepspeed_saves(tmp_path: Path) -> None:
    config = write_job(tmp_path, parallel={"tensor_parallel_size": 2}, checkpoint={"every_steps": 0})
    run = tmp_path / "run"
    port = str(find_free_port())  # by a Python of its own: the processes of a warm one are in another session
    process = launch(
        "deepspeed", "--num_gpus", "2", "--master_port", port, str(SCRIPT), "--config", str(config), FOREVER
    )
    wait_until(lambda: last_step(run) >= 3 or process.poll() is not None)
    # To the whole session, as a scheduler does: the ranks get it from there and once more from deepspeed.
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=LAUNCHER_TIMEOUT_SECONDS)
    wait_until(lambda: session_is_empty(process.pid))
    stopped = last_step(run)
    assert find_checkpoint(run / "checkpoints") == run / f"checkpoints/step_{stopped:08d}", stderr
    assert f"stopped by SIGTERM after step {stopped}, checkpoint saved" in stderr

    process = torchrun(config, f"train.steps={stopped + 3}")
    _, stderr = process.communicate(timeout=LAUNCHER_TIMEOUT_SECONDS)
    assert process.returncode == 0, stderr
    steps = f"train.steps={stopped + 6}"
    job = Job(config, steps, environments=slurm_environments(2))
    job.succeed()

    run_job(config, steps, f"train.output_dir={tmp_path}/straight", world_size=2)
    assert len(exact_records(run)) == stopped + 6
    assert exact_records(run) == exact_records(tmp_path / "straight")


def test_bad_input_through_launchers_is_one_line_and_no_zero(config: Path) -> None:
    for start, code in ((deepspeed, 2), (torchrun, 1)):
        process = start(config, "model.hiden_size=48")
        _, stderr = process.communicate(timeout=LAUNCHER_TIMEOUT_SECONDS)
        assert process.returncode == code
        assert [line for line in stderr.splitlines() if "hiden_size is unknown" in line] == [
            "error: model.hiden_size is unknown: did you mean model.hidden_size?"
        ]
