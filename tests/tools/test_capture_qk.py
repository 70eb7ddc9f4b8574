from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megalibi.checkpoint import Checkpoint
from megalibi.data.tokens.token_file import TokenFileWriter
from tests.cli.test_evaluate import train_and_save
from tests.support.ranks import run_on_ranks
from tests.support.runs import CPU, make_config
from tests.support.warm_python import warm_python

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "capture_qk.py"
LENGTH = 40
FP32_ATOL = 1e-5


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with TokenFileWriter(folder / "text", 509) as writer:
        writer.add_document(torch.randint(0, 509, (2000,), generator=torch.Generator().manual_seed(0)).numpy())
    config = make_config(
        str(folder / "text"),
        model={"vocab_size": 509, "num_attention_heads": 4},
        parallel={"tensor_parallel_size": 2},
        train={"output_dir": str(folder)},
    )
    run_on_ranks(2, train_and_save, config)
    return folder


def run(run_dir: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    fixed = ["--checkpoint", run_dir, "--data", run_dir / "text"]
    return subprocess.run([warm_python(), TOOL, *map(str, [*fixed, *arguments])], capture_output=True, text=True)


def test_what_is_saved_is_the_layers_q_and_k(run_dir):
    done = run(run_dir, "--length", LENGTH, "--layer", 0, "--output", run_dir / "qk.pt")
    assert done.returncode == 0, done.stderr
    assert f"layer 0, {LENGTH} tokens; --heads 4 --head-dim " in done.stdout
    saved = torch.load(run_dir / "qk.pt", weights_only=True)

    model = Checkpoint.open(run_dir).load_model(CPU)
    tokens = torch.randint(0, 509, (2000,), generator=torch.Generator().manual_seed(0))[:LENGTH]
    block = model.blocks[0]
    with torch.no_grad():
        _, x = block.attention_norm(F.embedding(tokens, model.embedding.weight))
        q, k, _ = F.linear(x, block.attention.qkv.weight, block.attention.qkv.bias).unflatten(-1, (3, 4, -1)).unbind(1)
    torch.testing.assert_close(saved["q"][0], q, rtol=0, atol=FP32_ATOL)
    torch.testing.assert_close(saved["k"][0], k, rtol=0, atol=FP32_ATOL)
    assert (saved["q"] - saved["k"]).abs().max() > 100 * FP32_ATOL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", 99], "error: --layer=99: must be 0 to "),
        (["--length", 2000], "error: --length=2000: "),
        (["--output", ROOT], f"error: --output={ROOT}: must be the name of a file, and is a folder"),
        (["--output", TOOL / "a.pt"], f"error: --output={TOOL / 'a.pt'} cannot be written: {TOOL} is no folder"),
    ],
)
def test_a_mistake_is_one_line(run_dir, arguments, message):
    done = run(run_dir, "--output", run_dir / "bad.pt", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
