"""Small checkpoints with a tokenizer, as a run could have left them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalibi.checkpoint import Checkpoint
from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.training import train_tokenizer
from megalibi.export.compose import compose_checkpoint
from megalibi.export.portable_tokenizer import PortableTokenizer, check_portable
from tests.support.conversions import MODELS, draw_weights
from tests.support.runs import make_config

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
VOCAB_SIZE = 420
BLOOM = MODELS["bloom"]
SCALE = 0.4
"""Of the matrices: larger weights than a trained model has would inflate what llama.cpp rounds to half precision."""


def make_checkpoint(
    folder: Path, *, tensor: int = 1, seq_length: int = 64, change: dict[str, float] | None = None, **model: Any
) -> Checkpoint:
    """A checkpoint of random weights, in a folder that must not exist; its tokenizer is in the folder above.

    ``change`` has numbers for the first element of parameters.
    """
    tokenizer = folder.parent / "t.model"
    if not tokenizer.exists():
        train_tokenizer([TEXT], VOCAB_SIZE - 20, tokenizer)
    defaults = {"hidden_size": 96, "ffn_hidden_size": 192, "num_attention_heads": 12, "vocab_size": VOCAB_SIZE}
    config = make_config(
        str(folder / "no data"),
        model={**defaults, **model},
        data={"tokenizer": str(tokenizer), "seq_length": seq_length},
        parallel={"tensor_parallel_size": tensor},
    )
    weights = {name: values * (SCALE if values.dim() > 1 else 1.0) for name, values in draw_weights(config).items()}
    for name, number in (change or {}).items():
        weights[name].view(-1)[0] = number
    folder.mkdir()
    compose_checkpoint(folder, config, weights.__getitem__)
    return Checkpoint.open(folder)


def load_portable(checkpoint: Checkpoint) -> PortableTokenizer:
    """A checkpoint's tokenizer."""
    return check_portable(Tokenizer(str(checkpoint.config.data.tokenizer)), "a GGUF file")
