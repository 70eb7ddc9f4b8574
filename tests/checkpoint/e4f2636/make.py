"""How the checkpoint in this folder was made: by the code of commit e4f2636, which this script has no part in.

    git clone . OLD && git -C OLD checkout e4f2636
    PYTHONPATH=OLD:OLD/kernels python tests/checkpoint/e4f2636/make.py OLD

A small model is trained on two tensor-parallel ranks at ZeRO 1 without an interruption. What stays is its checkpoint
after step 3, the losses of the steps 4 to 6, and the checkpoint's loss on the text by tools/evaluate.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from megalibi.data.token_file import TokenFileWriter  # where that commit had it

import megalibi

HERE = Path(__file__).resolve().parent
SAVED_STEP, STEPS = 3, 6
VOCAB_SIZE = 61
CONFIG = """\
model: {num_layers: 2, hidden_size: 16, num_attention_heads: 4, ffn_hidden_size: 32, vocab_size: 61, bias: true,
        init_std: 0.1, dropout: 0.1}
data: {train: tokens, valid: tokens, seq_length: 24}
optimizer: {learning_rate: 1.0e-2, warmup_steps: 2, clip_grad_norm: 0.5}
train: {steps: 6, global_batch_size: 4, micro_batch_size: 2, precision: fp32, output_dir: run, log_every_steps: 1}
parallel: {tensor_parallel_size: 2}
zero: {stage: 1}
checkpoint: {every_steps: 3, keep: 0}
"""


def main() -> None:
    """Train, evaluate, and keep the checkpoint with what is expected of it."""
    old = Path(sys.argv[1]).resolve()
    assert Path(megalibi.__file__).is_relative_to(old), f"{megalibi.__file__} is not of {old}"
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder / "tokens")
        (folder / "config.yaml").write_text(CONFIG)
        train = [*ranks, str(old / "launch" / "pretrain.py"), "--config", "config.yaml"]
        subprocess.run(train, cwd=folder, env=environment, check=True)
        checkpoints = folder / "run" / "checkpoints"
        checkpoint = checkpoints / f"step_{SAVED_STEP:08d}"
        evaluate = [sys.executable, str(old / "tools" / "evaluate.py"), "--checkpoint", str(checkpoint)]
        evaluate += ["--data", "tokens", "--lengths", "24,96", "--output", "evaluation.json"]
        subprocess.run(evaluate, cwd=folder, env=environment, check=True)
        results = json.loads((folder / "evaluation.json").read_text())["results"]
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        steps = {str(line["step"]): {key: line[key] for key in ("loss", "grad_norm", "sample_hash")} for line in lines
                 if "loss" in line and line["step"] > SAVED_STEP}  # fmt: skip
        expected = {"steps": steps, "losses_by_length": {str(row["length"]): row["loss"] for row in results}}
        (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
        shutil.copytree(checkpoint, HERE / checkpoint.name, dirs_exist_ok=True)
        for suffix in (".bin", ".idx"):
            shutil.copy(folder / f"tokens{suffix}", HERE)


def write_tokens(prefix: Path) -> None:
    """Write a text in which each token depends on the one before."""
    random = np.random.default_rng(0)
    tokens = np.zeros(1200, np.int64)
    for i in range(1, len(tokens)):
        tokens[i] = (tokens[i - 1] * 31 + random.integers(0, 4)) % VOCAB_SIZE
    with TokenFileWriter(prefix, VOCAB_SIZE) as writer:
        for start in range(0, len(tokens), 97):
            writer.add_document(tokens[start : start + 97])


if __name__ == "__main__":
    main()
