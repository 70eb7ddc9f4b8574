"""What a manifest says of the parameters is what the model says of them, on any topology."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megalibi.checkpoint import Checkpoint, save_checkpoint
from megalibi.checkpoint.parameters import build_without_memory, describe_parameters
from megalibi.config import Config, derive
from megalibi.engine.build import DTYPES
from megalibi.model import count_parameters
from megalibi.parallel import get_shard_spec
from tests.support.ranks import run_on_ranks
from tests.support.runs import build, identify, make_config, write_tokens

TWELVE_HEADS = {"num_attention_heads": 12}  # vocab_size is a prime: its table is padded at every tensor parallel size
MODELS: dict[str, dict[str, Any]] = {
    "tied": TWELVE_HEADS,
    "untied with biases": {**TWELVE_HEADS, "tie_embeddings": False, "bias": True, "embedding_norm": True},
    "adaptive": {"adaptive_cutoffs": [41, 122]},
    "adaptive untied": {"adaptive_cutoffs": [41, 122], "tie_embeddings": False},
    "t5_bias": {**TWELVE_HEADS, "position_method": "t5_bias", "bias": True},
    "learned without a final norm": {"position_method": "learned", "max_position_embeddings": 64, "final_norm": False,
                                      "norm_bias": True},
}  # fmt: skip
STAGE_AND_PRECISION = ((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16"))


def make_configs(prefix: str, folder: Path, tensor: int) -> list[Config]:
    """Return a run of each model; the ZeRO stages and precisions take turns."""
    return [
        make_config(
            prefix,
            model=model,
            parallel={"tensor_parallel_size": tensor},
            zero={"stage": STAGE_AND_PRECISION[number % 4][0]},
            train={"precision": STAGE_AND_PRECISION[number % 4][1], "output_dir": str(folder / name)},
        )
        for number, (name, model) in enumerate(MODELS.items(), start=tensor)
    ]


def save_all(configs: list[Config]) -> list[dict[str, torch.Size]]:
    """Save a checkpoint of each run; return the shapes of this rank's state by name, those of all names."""
    shapes = []
    for config in configs:
        engine, groups = build(config)
        derived, folder = derive(config, groups.world.size), Path(config.train.output_dir)
        save_checkpoint(engine, config, derived, identify(config), groups, folder=folder, step=1, run_id="a")
        named = engine.module.named_parameters(remove_duplicate=False)
        shapes.append({name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in named})
        engine.destroy()
    return shapes


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_the_manifest_says_what_the_model_says(tmp_path: Path, tensor: int) -> None:
    configs = make_configs(write_tokens(tmp_path, num_tokens=2000), tmp_path, tensor)
    for config, *shapes_by_rank in zip(configs, *run_on_ranks(tensor, save_all, configs), strict=True):
        checkpoint = Checkpoint.open(Path(config.train.output_dir))
        manifest = checkpoint.manifest
        padded = derive(config, tensor).padded_vocab_size
        assert (padded > config.model.vocab_size) == (tensor > 1 or not config.model.adaptive_cutoffs)
        model = build_without_memory(config, padded_vocab_size=padded, tensor_parallel_size=tensor)
        named = dict(model.named_parameters())
        assert list(manifest.parameters) == list(named)
        for name, parameter in named.items():
            entry = manifest.parameters[name]
            assert entry.local_shape(tensor) == parameter.shape
            assert entry.shard == get_shard_spec(parameter)
            assert entry.torch_dtype == DTYPES[config.train.precision]
        every_name = dict(model.named_parameters(remove_duplicate=False))
        assert set(manifest.ties) == set(every_name) - set(named)
        assert all(every_name[tied] is named[first] for tied, first in manifest.ties.items())
        assert bool(manifest.ties) == config.model.tie_embeddings

        # What the real ranks held, and the closed formula for the whole model, without padding.
        for shapes in shapes_by_rank:
            entries = {name: manifest.parameters[manifest.ties.get(name, name)] for name in shapes}
            assert {name: entry.local_shape(tensor) for name, entry in entries.items()} == shapes
        elements = sum(math.prod(entry.shape) for entry in manifest.parameters.values())
        assert elements == count_parameters(config.model)


def test_a_full_shape_is_the_same_at_every_tensor_parallel_size(tmp_path: Path) -> None:
    """And so is how a fused tensor is cut: three parts, the queries, keys and values."""
    by_size = {}
    for tensor in (1, 2, 4):
        config = make_configs("none", tmp_path, tensor)[0]
        padded = derive(config, tensor).padded_vocab_size
        model = build_without_memory(config, padded_vocab_size=padded, tensor_parallel_size=tensor)
        by_size[tensor] = describe_parameters(model, torch.float32)
    for name, entry in by_size[1].items():
        for other in (by_size[2][name], by_size[4][name]):
            assert other.shape == entry.shape
            assert (other.shard is None) == (entry.shard is None)
            if other.shard is not None and entry.shard is not None:
                assert (other.shard.dim, other.shard.parts) == (entry.shard.dim, entry.shard.parts)
    fused = {name for name, entry in by_size[4].items() if entry.shard is not None and entry.shard.parts == 3}
    assert fused == {f"blocks.{layer}.attention.qkv.weight" for layer in range(2)}
