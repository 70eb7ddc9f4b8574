"""Small checkpoints with a tokenizer, as a run could have left them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megalibi.checkpoint import Checkpoint
from megalibi.config import Config
from megalibi.data.tokenizer.training import train_tokenizer
from megalibi.export.compose import compose_checkpoint, describe_whole_model
from tests.support.runs import make_config

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
VOCAB_SIZE = 420
BLOOM: dict[str, Any] = {"embedding_norm": True, "bias": True, "activation": "gelu_tanh"}


def make_checkpoint(folder: Path, *, tensor: int = 1, seq_length: int = 64, **model: Any) -> Checkpoint:
    """A checkpoint of random weights, in a folder that must not exist; its tokenizer is in the folder above."""
    tokenizer = folder.parent / "t.model"
    if not tokenizer.exists():
        train_tokenizer([TEXT], VOCAB_SIZE - 20, tokenizer)
    defaults = {"hidden_size": 96, "ffn_hidden_size": 192, "num_attention_heads": 12, "vocab_size": VOCAB_SIZE}
    config: Config = make_config(
        str(folder / "no data"),
        model={**defaults, **model},
        data={"tokenizer": str(tokenizer), "seq_length": seq_length},
        parallel={"tensor_parallel_size": tensor},
    )
    folder.mkdir()
    parameters, _ = describe_whole_model(config)
    random = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(entry.shape, generator=random) * (0.3 if len(entry.shape) > 1 else 0.1)
        + (name.endswith("norm.weight") or 0.0)
        for name, entry in parameters.items()
    }
    compose_checkpoint(folder, config, weights.__getitem__)
    return Checkpoint.open(folder)
