"""What is not megalibi's own in a checkpoint: code, files beside its files, and what may not be read."""

from __future__ import annotations

import errno
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megalibi.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from megalibi.checkpoint.tensors.pickles import open_states
from megalibi.config import load_config
from megalibi.errors import CheckpointError, FileError
from megalibi.parallel import ALONE, refusing_together
from tests.support.format_2 import save_format_2
from tests.support.jobs import (
    Job,
    ScriptJob,
    exact_records,
    run_job,
    torchrun_environment,
    write_job,
)
from tests.support.planted import ROOT, make_codes, plant
from tests.support.ranks import run_on_ranks
from tests.support.runs import build


@pytest.mark.parametrize("name", ["posix", "builtin", "module", "in a type of DeepSpeed"])
@pytest.mark.parametrize("as_zip", [True, False])
def test_no_code_of_a_file_runs(tmp_path: Path, name: str, as_zip: bool) -> None:
    code, called = make_codes(tmp_path / "made")[name]
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {"weight": torch.ones(3)}, "lr_scheduler": code}, path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(CheckpointError) as refusal:
        open_states(path)
    assert "\n" not in str(refusal.value)
    if as_zip:  # the older form cannot be mapped
        assert str(refusal.value) == (
            f"{path} would run code when loaded, for it names {called}; it is not a checkpoint of megalibi"
        )
    assert not (tmp_path / "made").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "made").exists()  # so that the refusal was needed


def test_what_deepspeed_pickles_is_read(tmp_path: Path) -> None:
    """All of its types, with one that only a GPU's fp16 run has at ZeRO 1 to 3."""
    scaler = DynamicLossScaler(2.0**16, 1000, 1.0, 2, False)
    scaler.cur_iter, scaler.cur_scale = 7, 2.0**15
    saved = {
        "loss_scaler": scaler,
        "static": LossScaler(scale=4.0),
        "zero_stage": ZeroStageEnum.gradients,
        "param_slice_mappings": [{"weight": fragment_address(numel=3, start=7)}],
        "param_shapes": [{"weight": torch.Size([2, 3])}],
    }
    torch.save(saved, tmp_path / "a.pt")
    read = open_states(tmp_path / "a.pt")
    assert vars(read.pop("loss_scaler")) == vars(saved.pop("loss_scaler"))
    assert vars(read.pop("static")) == vars(saved.pop("static"))
    assert read == saved


class _ByName:
    """Pickled as Python 3.11.0 to 3.11.4 pickle a member of an enumeration."""

    def __init__(self, kind: type, name: str) -> None:
        self._called_with = kind, name

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, self._called_with


def test_a_stage_is_read_whatever_python_wrote_it_and_getattr_gets_nothing_else(tmp_path: Path) -> None:
    torch.save({"zero_stage": _ByName(ZeroStageEnum, "gradients")}, tmp_path / "a.pt")
    assert open_states(tmp_path / "a.pt") == {"zero_stage": ZeroStageEnum.gradients}
    torch.save({"zero_stage": _ByName(LossScaler, "__init__")}, tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match="would run code when loaded, for it names getattr; it is not a checkpoint"
    ):
        open_states(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_file_of_torch_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt cannot be loaded: ") as refusal:
        open_states(tmp_path / "a.pt")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["step_00000002/a.pt", None])
def test_a_disk_that_fails_is_one_line(tmp_path: Path, name: str | None) -> None:
    error = OSError(errno.EIO, "Input/output error", None if name is None else str(tmp_path / name))
    with pytest.raises(FileError) as refusal, refusing_together(ALONE, tmp_path, "; go on"):
        raise error
    assert str(refusal.value) == f"{tmp_path / (name or '')}: Input/output error; go on"


def rewrite_in_format_2(path: str, folder: str) -> None:
    """Let DeepSpeed write the checkpoint of step 2, in place of our files."""
    config = load_config(Path(path), [])
    engine, groups = build(config)
    run_id = load_checkpoint(engine, Path(folder) / "step_00000002", groups).run_id
    save_format_2(config, engine, groups, folder, 2, run_id)
    engine.destroy()


@pytest.fixture(scope="module", params=["format 3", "format 2, ZeRO 1", "format 2, ZeRO 3"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two tensor ranks with a checkpoint at step 2."""
    stage = 3 if request.param.endswith("3") else 1
    config = write_job(tmp_path_factory.mktemp("job"), parallel={"tensor_parallel_size": 2}, zero={"stage": stage})
    run_job(config, "train.steps=2", world_size=2)
    if request.param.startswith("format 2"):
        run_on_ranks(2, rewrite_in_format_2, str(config), str(config.parent / "run" / "checkpoints"))
    return config


def refusal_of(path: Path) -> str:
    """Return how a message begins that refuses a file with code in it."""
    if path.suffix == ".safetensors":  # which have no code, and this one is none
        return f"{path} cannot be loaded: "
    return f"{path} would run code when loaded, for it names exec; it is not a checkpoi"


def file_of_rank_1(checkpoint: Path, which: str) -> str:
    """Return the name of a file of tensor rank 1: of its weights, or of its optimizer."""
    files = sorted(path.name for path in checkpoint.iterdir() if path.suffix in (".pt", ".safetensors"))
    words = ("model_states", "weights_") if which == "weights" else ("optim_states", "optimizer_")
    return max(name for name in files if any(word in name for word in words))


def copy_run(config: Path, folder: Path) -> Path:
    """Return the checkpoint of a copy of the run."""
    shutil.copytree(config.parent / "run", folder)
    checkpoint = find_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def error_of(job: ScriptJob, codes: set[int] | None = None) -> str:
    """Return the line with which a job ended, on every rank with exit code 2."""
    assert set(job.wait()) == (codes or {2}), job.output
    assert "Traceback" not in job.output, job.output
    (line,) = (line for line in job.output.splitlines() if line.startswith("error: "))
    return line


@pytest.mark.parametrize("which", ["weights", "optimizer"])
@pytest.mark.parametrize("resume", ["auto", "a path"])
def test_a_run_does_not_resume_from_code(config: Path, tmp_path: Path, which: str, resume: str) -> None:
    checkpoint = copy_run(config, tmp_path / "run")
    path = plant(checkpoint, file_of_rank_1(checkpoint, which), tmp_path / "made")
    overrides = [f"train.output_dir={tmp_path / 'run'}"]
    if resume == "a path":
        overrides = [f"train.output_dir={tmp_path / 'new'}", f"checkpoint.resume={checkpoint}"]
    line = error_of(Job(config, *overrides, world_size=2))
    assert line.startswith(f"error: {refusal_of(path)}")
    assert f"(rank 0 on {socket.gethostname()})" in line
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("which", ["weights", "optimizer"])
def test_no_tool_reads_code(config: Path, tmp_path: Path, which: str) -> None:
    checkpoint = copy_run(config, tmp_path / "run")
    path = plant(checkpoint, file_of_rank_1(checkpoint, which), tmp_path / "made")
    common = ["--checkpoint", str(checkpoint), "--data", str(config.parent / "tokens")]
    evaluate = [*common, "--lengths", "32", "--tokens", "200", "--output", str(tmp_path / "out.json")]
    sharing = [*evaluate, "--tensor-parallel-size", "2"]
    for script, arguments, world_size in (
        ("evaluate.py", evaluate, 1),
        ("evaluate.py", sharing, 2),
        ("capture_qk.py", [*common, "--length", "32", "--output", str(tmp_path / "qk.pt")], 1),
    ):
        job = ScriptJob(ROOT / "tools" / script, [arguments] * world_size, tmp_path, torchrun_environment(world_size))
        assert error_of(job).startswith(f"error: {refusal_of(path)}")
    with pytest.raises(CheckpointError, match=re.escape(refusal_of(path))):
        dict(Checkpoint.open(checkpoint).read_weights())
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "fp32")])
def test_names_that_are_patterns_and_files_beside_a_checkpoints_own_do_not_matter(
    tmp_path: Path, stage: int, precision: str
) -> None:
    folder = tmp_path / "run[1]*?"
    folder.mkdir()
    config = write_job(
        folder,
        parallel={"tensor_parallel_size": 2},
        zero={"stage": stage},
        train={"steps": 4, "precision": precision, "output_dir": str(folder / "a[b]*?")},
    )
    run_job(config, f"train.output_dir={tmp_path / 'straight'}", world_size=2)
    run_job(config, "train.steps=2", world_size=2)
    checkpoint = find_checkpoint(folder / "a[b]*?" / "checkpoints")
    assert checkpoint is not None
    for name in (
        "mp_rank_00_model_states.pt",
        "weights_tensor_00_data_0000_copy.safetensors",
        "weights_tensor_02_data_0000.safetensors",
        "optimizer_tensor_00_data_0001.safetensors",
    ):
        (checkpoint / name).write_bytes(b"of somebody else")
    job = run_job(config, world_size=2)
    assert "resumed from" in job.read_log(0)
    assert exact_records(folder / "a[b]*?") == exact_records(tmp_path / "straight")
