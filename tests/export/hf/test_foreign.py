"""Folders of others that cannot be read: each is refused by name, in one line, and nothing in it is run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalibi.errors import CheckpointError, ConfigError, UserError
from megalibi.export.hf.read import plan_import
from megalibi.export.hf.write import convert_to_hf
from tests.support.conversions import configure_model, plan, write_random


class Planted:
    """Would make a file if it were unpickled by a loader that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each format, in two files or more."""
    made = {}
    for kind in ("mpt", "falcon"):
        folder = tmp_path_factory.mktemp(kind)
        checkpoint, _ = write_random(folder / "a", configure_model(kind))
        convert_to_hf(checkpoint, folder / "hf", plan(checkpoint, kind), compare=False, max_shard_bytes=60_000)
        made[kind] = folder / "hf"
    return made


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def try_import(folder: Path, *, accept: bool = False) -> None:
    plan_import(folder, config=None, tensor_parallel_size=1, accept_rounded_bias=accept)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mpt", {"model_type": "llama"}, "model_type='llama': must be one of mpt, bloom, falcon, which have ALiBi"),
        ("mpt", {"model_type": ["mpt"]}, "must be one of mpt, bloom, falcon, which have ALiBi"),
        (
            "mpt",
            {"_attn_implementation": "somebody/kernel"},
            "_attn_implementation='somebody/kernel': must be eager or",
        ),
        ("mpt", {"architectures": ["MptForQuestionAnswering"]}, "must be \\[MptForCausalLM\\]"),
        ("mpt", {"attn_config": {"alibi": False}}, "alibi=False: must be True"),
        ("mpt", {"attn_config": {"alibi_bias_max": 16}}, "alibi_bias_max=16: must be 8: the slopes of ALiBi end at 2"),
        ("mpt", {"attn_config": {"qk_ln": True}}, "qk_ln=True: must be False"),
        ("mpt", {"attn_config": {"clip_qkv": 6.0}}, "clip_qkv=6.0: must be None"),
        ("mpt", {"attn_config": {"softmax_scale": 0.5}}, "softmax_scale=0.5: must be null, or"),
        ("mpt", {"attn_config": {"prefix_lm": True}}, "prefix_lm=True"),
        ("mpt", {"attn_config": 5}, "attn_config: must be an object"),
        ("mpt", {"no_bias": False}, "no_bias=False: must be True"),
        ("mpt", {"logit_scale": 0.5}, "logit_scale=0.5: must be None"),
        ("mpt", {"n_heads": "4"}, "n_heads='4': must be int"),
        ("mpt", {"n_heads": 5}, "num_attention_heads=5: must divide model.hidden_size=48"),
        ("mpt", {"quantization_config": {}}, "quantization_config: must not be there"),
        ("mpt", {"d_model": 96}, "has the shape"),
        ("mpt", {"n_layers": 3}, "does not hold transformer.blocks.2"),
        ("mpt", {"n_layers": 1}, "holds transformer.blocks.1.*, which MptForCausalLM does not have"),
        ("mpt", {"tie_word_embeddings": False}, "does not hold lm_head.weight"),
        ("mpt", {"vocab_size": 500}, r"transformer.wte.weight has the shape \[509, 48\]: must be \[500, 48\]"),
        ("falcon", {"alibi": False}, "alibi=False: must be True"),
        ("falcon", {"multi_query": True}, "multi_query=True: must be False"),
        ("falcon", {"parallel_attn": True}, "parallel_attn=True: must be False"),
        ("falcon", {"new_decoder_architecture": True}, "new_decoder_architecture=True"),
        ("falcon", {"activation": "silu"}, "activation='silu': must be one of gelu, gelu_pytorch_tanh, relu"),
        ("falcon", {"num_kv_heads": 1}, "num_kv_heads=1: must be num_attention_heads=4"),
        ("falcon", {"megalibi_seq_length": 2048}, "bfloat16.*and ours does not: give --accept-rounded-bias"),
    ],
)
def test_a_model_that_ours_cannot_be_is_refused(
    folders: dict[str, Path], tmp_path: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    folder = copy(folders[kind], tmp_path / "hf")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | changes))
    with pytest.raises((ConfigError, CheckpointError), match=message) as caught:
        try_import(folder)
    assert "\n" not in str(caught.value)


def damage(folder: Path, how: str) -> str:
    """Damage a folder of several files, and return how the refusal begins to name it."""
    shards = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    if how == "truncated":
        shards[1].write_bytes(shards[1].read_bytes()[:-1])
        return f"{shards[1]} cannot be loaded"
    if how == "missing":
        shards[1].unlink()
        return f"{index} names {shards[1].name}, which is missing"
    if how == "swapped":
        first, second = shards[0].read_bytes(), shards[1].read_bytes()
        shards[0].write_bytes(second)
        shards[1].write_bytes(first)
        return f"{shards[0]} holds transformer"
    if how == "text":
        shards[0].write_text("nothing of the kind")
        return f"{shards[0]} cannot be loaded"
    if how == "integers":
        tensors = load_file(shards[0])
        save_file({name: values.int() for name, values in tensors.items()}, shards[0])
        return f"{shards[0]}: transformer.wte.weight is of torch.int32: must be fp32, bf16 or fp16"
    if how == "untied":
        tensors = load_file(shards[0])
        save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}, shards[0])
        fields["weight_map"]["lm_head.weight"] = shards[0].name
        index.write_text(json.dumps(fields))
        return f"{folder}: lm_head.weight is not transformer.wte.weight, to which config.json ties it"
    if how in ("outside", "folder", "other kind"):
        place = {"outside": "../secret.safetensors", "folder": "..", "other kind": "pickle.bin"}[how]
        fields["weight_map"]["transformer.wte.weight"] = place
        index.write_text(json.dumps(fields))
        return (
            f"{index} names pickle.bin: must end in"
            if how == "other kind"
            else f"{index}: transformer.wte.weight is in"
        )
    if how == "no map":
        index.write_text("{}")
        return f"{index}: weight_map must say"
    index.write_text("[")
    return f"{index} cannot be read as JSON"


@pytest.mark.parametrize(
    "how",
    [
        *("truncated", "missing", "swapped", "text", "integers", "untied"),
        *("outside", "folder", "other kind", "no map", "no json"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(folders: dict[str, Path], tmp_path: Path, how: str) -> None:
    folder = copy(folders["mpt"], tmp_path / "hf")
    expected = damage(folder, how)
    with pytest.raises(UserError) as caught:
        try_import(folder)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_no_pickle_runs_code(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_bytes((folders["mpt"] / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="has no weights: must have model"):
        try_import(folder)
    path = folder / "pytorch_model.bin"
    for old in (False, True):
        torch.save({"a": Planted(tmp_path / "ran")}, path, _use_new_zipfile_serialization=not old)
        with pytest.raises(CheckpointError, match=f"{path} would run code when loaded, for it names posix.system"):
            try_import(folder)
    torch.save({"a": 5}, path)
    with pytest.raises(CheckpointError, match="holds other things than tensors by name"):
        try_import(folder)
    torch.save({"a": torch.zeros(3)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{path} cannot be loaded"):
        try_import(folder)
    assert not (tmp_path / "ran").exists()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        try_import(folder)
