"""What a user can mend is one line that names it, and exit code 2, whatever part of the program meets it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megalibi.data.tokenizer.training import train_tokenizer
from tests.support import jobs
from tests.support.jobs import Job, run_job, write_job
from tests.support.ranks import find_free_port

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
NO_ACCELERATOR = "xpu"
HERE, FOUND = ("cuda", "a GPU") if torch.cuda.is_available() else ("cpu", "no GPU")
ACCELERATOR_REFUSED = (
    f"DS_ACCELERATOR={NO_ACCELERATOR} in the environment: must be {HERE} or unset, since torch finds {FOUND} on "
    f"{socket.gethostname()}"
)
HUGE = 2**62


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    train_tokenizer([Path(__file__).read_text()], 400, folder / "tokenizer.model")
    return write_job(folder, train={"steps": 1})


def assert_refused(job: Job, message: str) -> None:
    assert job.wait() == [2], job.output
    line = job.read_log(0).splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in job.output


VALUES = {
    "train.output_dir=/proc/x": "train.output_dir=/proc/x cannot be written: /proc takes no file (No such file or dir",
    "train.output_dir=": "train.output_dir=null: must be text",
    'train.output_dir=""': "train.output_dir='': must be the path of the run's folder",
    f"zero.bucket_elements={HUGE}": f"zero.bucket_elements={HUGE}: must be at most 2,147,483,647",
    "train.global_batch_size=4000000000000": "=4000000000000: must be at most 16,777,216",
    "parallel.timeout_minutes=1e300": "parallel.timeout_minutes=1e+300: must be at most 525,600",
    f"model.vocab_size={2**63}": f"model.vocab_size={2**63}: must be a whole number of at most 64 bits",
    f"model.vocab_size={HUGE}": f"model.vocab_size={HUGE}: must be at most 2,147,483,647",
    f"model.padded_vocab_size={HUGE}": f"model.padded_vocab_size={HUGE}: must be at most 2,147,483",
    f"model.num_layers={HUGE}": f"model.num_layers={HUGE}: must be at most 100,000",
    f"model.hidden_size={HUGE}": f"model.hidden_size={HUGE}: must be at most 16,777,216",
    f"model.ffn_hidden_size={HUGE}": f"model.ffn_hidden_size={HUGE}: must be at most 16,777,216",
    f"model.hidden_size={2**24}": "not enough memory on ",
}


@pytest.mark.parametrize("override", VALUES)
def test_a_value_that_cannot_be(config: Path, override: str) -> None:
    assert_refused(Job(config, f"train.output_dir={config.parent}/new", override), VALUES[override])


@pytest.mark.parametrize(
    ("name", "is_folder", "message"),
    [
        ("tensorboard", False, "tensorboard is no folder"),
        ("checkpoints", False, "checkpoints is no folder"),
        ("metrics.jsonl", True, "metrics.jsonl must be a file, and is a folder"),
        ("config.yaml", True, "config.yaml must be a file, and is a folder"),
        ("run_info.json", True, "run_info.json must be a file, and is a folder"),
        ("config.yaml.tmp", True, "config.yaml.tmp is a folder, but the file is written there first: move it away"),
    ],
)
def test_a_run_folder_in_which_a_name_is_taken(config: Path, name: str, is_folder: bool, message: str) -> None:
    run = config.parent / f"taken_{name}"
    run.mkdir()
    (run / name).mkdir() if is_folder else (run / name).touch()
    assert_refused(Job(config, f"train.output_dir={run}"), f"train.output_dir={run} cannot be written: {run}/{message}")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (LAUNCHED | {"RANK": "x"}, "RANK='x' in the launcher's environment: must be a whole number from 0 to 0"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "has RANK but no MASTER_ADDR: start with deepspeed"),
        (
            LAUNCHED | {"MASTER_PORT": "99999999"},
            "MASTER_PORT='99999999' in the launcher's environment: must be a whole number from 1 to 65535",
        ),
        ({"DS_ACCELERATOR": NO_ACCELERATOR}, ACCELERATOR_REFUSED),
    ],
)
def test_an_environment_that_cannot_be(config: Path, environment: dict[str, str], message: str) -> None:
    assert_refused(Job(config, f"train.output_dir={config.parent}/new", environments=[environment]), message)


def test_a_port_in_use(config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        job = Job(
            config,
            f"train.output_dir={config.parent}/new",
            environments=[LAUNCHED | {"MASTER_PORT": str(port)}],
        )
        message = f"port {port} of {socket.gethostname()} is in use, perhaps by another run: start with --master_port"
        assert_refused(job, message)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_odd_bucket_is_rounded_up(config: Path, stage: int) -> None:
    for elements in (1, 12345, 99_999_999):
        run = config.parent / f"bucket_{stage}_{elements}"
        run_job(config, f"zero.bucket_elements={elements}", f"zero.stage={stage}", f"train.output_dir={run}")


@pytest.fixture
def forbidden(config: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the job's files, for a process without privileges; what it may not read is what a test takes away."""
    folder = config.parent / "forbidden"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(config.parent, folder, ignore=lambda _, names: [n for n in names if not n.startswith("tok")])
    shutil.copy(config, folder)
    (folder / "run").mkdir()
    monkeypatch.setattr(jobs, "SCRIPT", Path(__file__).parents[1] / "support" / "without_privileges.py")
    yield folder
    for path in (folder, *folder.iterdir()):
        path.chmod(0o700)


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("tokens.bin", 0, "tokens.bin: Permission denied; ask its owner for the right to use it, or give another path"),
        ("tokens.idx", 0, "tokens.idx: Permission denied; ask its owner"),
        ("tokenizer.model", 0, "tokenizer.model: Permission denied; ask its owner"),
        ("config.yaml", 0, "config.yaml cannot be read: Permission denied; give the path of a YAML file"),
        ("run", 0o500, "run is read-only"),
        ("", 0o600, "/config.yaml cannot be read: Permission denied; give the path of a YAML file"),
    ],
)
def test_what_one_may_not_read_or_write(forbidden: Path, name: str, mode: int, message: str) -> None:
    overrides = [
        f"data.train={forbidden}/tokens",
        f"data.tokenizer={forbidden}/tokenizer.model",
        f"train.output_dir={forbidden}/run",
    ]
    (forbidden / name).chmod(mode)
    job = Job(forbidden / "config.yaml", *overrides)
    (code,) = job.wait()
    for path in (forbidden, *forbidden.iterdir()):
        path.chmod(0o700)
    assert code == 2, job.output
    (line,) = job.read_log(0).splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_rank_that_alone_meets_something_says_it(config: Path) -> None:
    """Rank 0 waits for it meanwhile, and would say nothing."""
    port = str(find_free_port())
    environments = [
        LAUNCHED | {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
        for rank in range(2)
    ]
    environments[1]["DS_ACCELERATOR"] = NO_ACCELERATOR
    job = Job(config, f"train.output_dir={config.parent}/new", environments=environments)
    job.processes[1].join(60)
    job.kill()
    assert job.processes[1].exitcode == 2, job.output
    (line,) = job.read_log(1).splitlines()
    assert line == f"error: {ACCELERATOR_REFUSED} [rank 1/2 on {socket.gethostname()}]"


@pytest.mark.parametrize(("utf8", "code"), [("", 0), ("0", 2)])
def test_a_name_that_the_locale_cannot_write(tmp_path: Path, utf8: str, code: int) -> None:
    """Python takes the locale C for UTF-8, unless it is told not to."""
    (tmp_path / "b\u00fc").touch()
    program = (
        f"from megalibi.runtime.exit import run_tool; run_tool(lambda: open({str(tmp_path)!r} + '/b\\xfc').close())"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONUTF8", "LC_ALL")}
    environment |= {"LC_ALL": "C"} | ({"PYTHONUTF8": utf8} if utf8 else {})
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    if code:
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert "cannot be written in this locale's encoding, ascii: set LC_ALL=C.UTF-8, or PYTHONUTF8=1" in line
