from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

import megalibi
from megalibi.checkpoint import Checkpoint
from tests.export.gguf.checkpoints import make_checkpoint
from tests.support.jobs import Job, run_job, write_job
from tests.support.warm_python import warm_python

ROOT = Path(__file__).parents[2]
FORMAT_1 = ROOT / "tests" / "checkpoint" / "e4f2636" / "step_00000003"


MODEL = {"ffn_hidden_size": 192}
"""Four times hidden_size, as MPT has it."""


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [warm_python(), ROOT / "tools" / "convert_checkpoint.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two tensor ranks with a checkpoint at step 2."""
    config = write_job(tmp_path_factory.mktemp("job"), model=MODEL, parallel={"tensor_parallel_size": 2})
    run_job(config, "train.steps=2", world_size=2)
    return config


def test_a_run_goes_on_from_what_reshard_wrote(config: Path, tmp_path: Path) -> None:
    done = run("reshard", config.parent / "run", tmp_path / "one", "--tensor-parallel-size", 1, "--zero-stage", 0)
    assert done.returncode == 0, done.stderr
    what = "step_00000002 (step 2): tensor 2 x data 1, ZeRO 1 -> tensor 1 x data 1, ZeRO 0"
    go_on = f"in {tmp_path}/one; a run goes on from it with checkpoint.resume={tmp_path}/one"
    assert done.stdout == f"{config.parent}/run/checkpoints/{what}, {go_on}\n"
    job = run_job(
        config,
        f"checkpoint.resume={tmp_path}/one",
        f"train.output_dir={tmp_path}/run",
        "parallel.tensor_parallel_size=1",
        "zero.stage=0",
        "train.steps=3",
    )
    assert "goes on with other values than before: train.steps 2 -> 3" in job.read_log(0)


def test_a_dry_run_writes_nothing_and_says_whether_it_can_be(config: Path, tmp_path: Path) -> None:
    done = run("reshard", config.parent / "run", tmp_path / "new", "--tensor-parallel-size", 4, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("tensor 2 x data 1, ZeRO 1 -> tensor 4 x data 1, ZeRO 1; it can be done\n")
    done = run("reshard", config.parent / "run", tmp_path / "new", "--tensor-parallel-size", 3, "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: parallel.tensor_parallel_size=3: must divide model.num_attention_heads=4\n"
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line(config: Path, tmp_path: Path) -> None:
    for words, message in (
        ((config.parent / "run", tmp_path), f"OUT={tmp_path}: must not exist; give another name, or move that one"),
        (
            (config.parent / "run", tmp_path / "a", "--data-parallel-size", 0),
            "--data-parallel-size=0: must be at least 1",
        ),
        ((tmp_path, tmp_path / "a"), f"{tmp_path} is no checkpoint and has none: give a step's folder, a run's folder"),
    ):
        done = run("reshard", *words)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {message}")


def test_what_it_writes_is_whole(config: Path, tmp_path: Path) -> None:
    assert run("reshard", config.parent / "run", tmp_path / "new", "--data-parallel-size", 2).returncode == 0
    assert list(Checkpoint.open(tmp_path / "new").find_damage()) == []
    done = run("verify", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/new: 8 files, ")
    certificate = json.loads((tmp_path / "new" / "certificate.json").read_text())
    assert len(certificate["tensors"]) == 3 * 14
    assert all(record["bit_equal"] for record in certificate["tensors"])


def test_a_checkpoint_is_no_folder_of_a_run(config: Path, tmp_path: Path) -> None:
    """A run would begin anew in it without a word."""
    assert run("reshard", config.parent / "run", tmp_path / "new").returncode == 0
    job = Job(config, f"train.output_dir={tmp_path}/new", world_size=2)
    assert set(job.wait()) == {2}
    assert f"error: train.output_dir={tmp_path}/new: must be the folder of a run, and is a checkpoint; " in job.output


def test_an_old_checkpoint_is_written_anew_with_its_ties(tmp_path: Path) -> None:
    assert run("reshard", FORMAT_1, tmp_path / "new", "--tensor-parallel-size", 1).returncode == 0
    old, new = Checkpoint.open(FORMAT_1), Checkpoint.open(tmp_path / "new")
    assert (old.manifest.format_version, new.manifest.format_version) == (1, 3)
    assert new.manifest.ties == {"output.weight": "embedding.weight"}
    assert new.manifest.versions["megalibi"] == megalibi.__version__
    for name in old.parameters:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(new.read_state().read_whole(name, kind), old.read_state().read_whole(name, kind))


def test_out_to_transformers_and_in_again_for_a_run(config: Path, tmp_path: Path) -> None:
    """A run begins from what came in, if it was made for that run."""
    done = run("to-hf", config.parent / "run", tmp_path / "hf", "--format", "mpt", "--dry-run")
    assert (done.returncode, list(tmp_path.iterdir())) == (0, [])
    what = "step_00000002 (step 2) as MptForCausalLM in float32; it can be done\n"
    why = "No tokenizer comes along: the run had no data.tokenizer, and --tokenizer names none.\n"
    assert done.stdout.endswith(what + why)
    done = run("to-hf", config.parent / "run", tmp_path / "hf", "--format", "mpt", "--max-shard-size", "100KB")
    assert done.returncode == 0, done.stderr
    assert "14 tensors bit-equal; at " in done.stdout
    assert "| last training loss |" in (tmp_path / "hf" / "README.md").read_text()
    options = ("--no-compare", "--tensor-parallel-size", 2)
    done = run("from-hf", tmp_path / "hf", tmp_path / "a", "--config", config, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("14 tensors bit-equal; logits not compared: --no-compare was given\n")
    overrides = [f"train.output_dir={tmp_path}/run", "train.steps=1"]
    job = run_job(config, f"checkpoint.resume={tmp_path}/a", *overrides, world_size=2)
    assert "step_00000001" in {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert run("from-hf", tmp_path / "hf", tmp_path / "b", "--no-compare").returncode == 0
    job = Job(config, f"checkpoint.resume={tmp_path}/b", f"train.output_dir={tmp_path}/run2", world_size=2)
    assert set(job.wait()) == {2}
    assert "must be a checkpoint that was imported for this run" in job.output


def test_the_weights_alone(config: Path, tmp_path: Path) -> None:
    done = run("to-fp32", config.parent / "run", tmp_path / "new" / "fp32", "--dry-run")
    assert (done.returncode, list(tmp_path.iterdir())) == (0, [])
    assert done.stdout.endswith("step_00000002 (step 2): 14 tensors in fp32; it can be done\n")
    done = run("to-fp32", config.parent / "run", tmp_path / "new" / "fp32")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"in {tmp_path}/new/fp32, each read back from there with the same bits\n")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"fp32"}


def test_a_file_for_llama_cpp(tmp_path: Path) -> None:
    """Which has the model and its tokenizer; what is refused makes no folder."""
    make_checkpoint(tmp_path / "c")
    output = tmp_path / "new" / "m.gguf"
    done = run("to-gguf", tmp_path / "c", output, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/c (step 0) -> GGUF, f16; it can be done\n"
    tokenizer = (tmp_path / "t.model").rename(tmp_path / "moved.model")
    done = run("to-gguf", tmp_path / "c", output)
    assert (done.returncode, done.stdout) == (2, "")
    why = f"{tmp_path}/t.model, where the run had it, is not there, and --tokenizer names none"
    assert done.stderr == f"error: a GGUF file has the model and its tokenizer: give --tokenizer FILE, for {why}\n"
    assert not output.parent.exists()
    done = run("to-gguf", tmp_path / "c", output, "--tokenizer", tokenizer, "--no-compare")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in output.parent.iterdir()} == {"m.gguf", "m.gguf.certificate.json"}
    done = run("to-gguf", tmp_path / "c", output)
    assert done.stderr == f"error: OUT={output}: must not exist; give another name, or move that one\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("to-hf", "RUN", "OUT", "--format", "bloom"), "model.activation=gelu: must be gelu_tanh for --format bloom"),
        (("to-hf", "RUN", "RUN", "--format", "mpt"), "OUT="),
        (("from-hf", "RUN", "OUT"), "RUN has no config.json: must be a folder of Hugging Face"),
        (("from-hf", "RUN", "OUT", "--tensor-parallel-size", "0"), "--tensor-parallel-size=0: must be at least 1"),
    ],
)
def test_what_cannot_go_out_or_in_is_one_line(
    config: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    places = {"RUN": str(config.parent / "run"), "OUT": str(tmp_path / "out")}
    done = run(*(places.get(word, word) for word in words))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message.replace('RUN', places['RUN'])}")
    assert list(tmp_path.iterdir()) == []
