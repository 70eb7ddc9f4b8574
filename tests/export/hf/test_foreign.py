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

from megalibi.errors import CheckpointError, ConfigError, FileError, UserError
from megalibi.export.hf.incoming.read import convert_from_hf, plan_import
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
        convert_to_hf(checkpoint, folder / "hf", plan(checkpoint, kind, compare=False), max_shard_bytes=60_000)
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
        ("mpt", {"model_type": "llama"}, 'model_type="llama": must be one of mpt, bloom, falcon, which have ALiBi'),
        ("mpt", {"model_type": ["mpt"]}, "must be one of mpt, bloom, falcon, which have ALiBi"),
        (
            "mpt",
            {"_attn_implementation": "somebody/kernel"},
            '_attn_implementation="somebody/kernel": must be eager or',
        ),
        ("mpt", {"architectures": ["MptForQuestionAnswering"]}, r'must be \["MptForCausalLM"\]'),
        ("mpt", {"attn_config": {"alibi": False}}, "attn_config.alibi=false: must be true"),
        (
            "mpt",
            {"attn_config": {"alibi_bias_max": 16}},
            "attn_config.alibi_bias_max=16: must be 8: the slopes of ALiBi end at 2",
        ),
        ("mpt", {"attn_config": {"qk_ln": True}}, "attn_config.qk_ln=true: must be false"),
        ("mpt", {"attn_config": {"clip_qkv": 6.0}}, "attn_config.clip_qkv=6.0: must be null"),
        ("mpt", {"attn_config": {"softmax_scale": 0.5}}, "attn_config.softmax_scale=0.5: must be null, or"),
        ("mpt", {"attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm=true"),
        ("mpt", {"attn_config": 5}, "attn_config: must be an object"),
        ("mpt", {"no_bias": False}, "no_bias=false: must be true"),
        ("mpt", {"logit_scale": 0.5}, "logit_scale=0.5: must be null"),
        ("mpt", {"n_heads": "4"}, 'n_heads="4": must be a whole number'),
        ("mpt", {"d_model": 0}, "d_model=0: must be at least 1"),
        ("mpt", {"d_model": -48}, "d_model=-48: must be at least 1"),
        ("mpt", {"n_layers": 10**9}, "model.num_layers=1000000000: must be at most"),
        ("mpt", {"megalibi_seq_length": 10**15}, "megalibi_seq_length=1000000000000000: must be at most"),
        ("mpt", {"max_seq_len": "long", "megalibi_seq_length": None}, 'max_seq_len="long": must be a whole number'),
        ("mpt", {"layer_norm_epsilon": 10**400}, r"layer_norm_epsilon=10*\.\.\.: must be a finite number"),
        ("mpt", {"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon=NaN: must be a finite number"),
        ("mpt", {"num_attention_heads": 2}, "n_heads=4, num_attention_heads=2: must be the same"),
        ("mpt", {"n_layers": 5000}, "holds 14 tensors, too few for its number of layers"),
        ("mpt", {"max_seq_len": 10**20}, "max_seq_len=100000000000000000000: must be at most 16777216"),
        ("mpt", {"attn_config": {"rope": True}}, "attn_config.rope=true: must be false"),
        ("mpt", {"attn_config": {"kv_n_heads": 2}}, "attn_config.kv_n_heads=2: must be 4"),
        ("mpt", {"norm_type": "rmsnorm"}, 'norm_type="rmsnorm": must be layernorm'),
        ("mpt", {"n_heads": 5}, "num_attention_heads=5: must divide model.hidden_size=48"),
        ("mpt", {"quantization_config": {}}, "quantization_config: must not be there"),
        ("mpt", {"d_model": 96}, "has the shape"),
        ("mpt", {"n_layers": 3}, "does not hold transformer.blocks.2"),
        ("mpt", {"n_layers": 1}, "holds transformer.blocks.1.*, which MptForCausalLM does not have"),
        ("mpt", {"tie_word_embeddings": False}, "does not hold lm_head.weight"),
        ("mpt", {"vocab_size": 500}, r"transformer.wte.weight has the shape \[509, 48\]: must be \[500, 48\]"),
        ("falcon", {"alibi": False}, "alibi=false: must be true"),
        ("falcon", {"multi_query": True}, "multi_query=true: must be false"),
        ("falcon", {"parallel_attn": True}, "parallel_attn=true: must be false"),
        ("falcon", {"new_decoder_architecture": True}, "new_decoder_architecture=true"),
        ("falcon", {"activation": "silu"}, 'activation="silu": must be one of gelu, gelu_pytorch_tanh, relu'),
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


def test_a_config_that_nests_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        try_import(tmp_path)


def test_the_classes_names_of_others_are_taken(folders: dict[str, Path], tmp_path: Path) -> None:
    """As MosaicML's folders have them."""
    folder = copy(folders["mpt"], tmp_path / "hf")
    fields = json.loads((folder / "config.json").read_text())
    for name in ("MPTForCausalLM", "MptModel"):
        (folder / "config.json").write_text(json.dumps(fields | {"architectures": [name]}))
        try_import(folder)


def test_a_whole_file_is_taken_before_an_index(folders: dict[str, Path], tmp_path: Path) -> None:
    """As transformers does it: an index beside it may be of what was there before."""
    folder = copy(folders["mpt"], tmp_path / "hf")
    tensors = {name: values for path in folder.glob("*.safetensors") for name, values in load_file(path).items()}
    save_file(tensors | {"transformer.norm_f.weight": torch.full((48,), 7.0)}, folder / "model.safetensors")
    plan = plan_import(folder, config=None, tensor_parallel_size=1, accept_rounded_bias=False)
    assert plan.tensors.files == ["model.safetensors"]
    assert (plan.tensors.read("transformer.norm_f.weight") == 7.0).all()


@pytest.mark.parametrize(
    "changes", [{"initializer_range": "x"}, {"attn_config": {"attn_pdrop": "x"}}], ids=["weights", "dropout"]
)
def test_what_the_class_makes_of_a_field_is_one_line(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Fields that are none of ours are the class's affair; in a .bin, too, whose model is built another way."""
    folder = copy(folders["mpt"], tmp_path / "hf")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | changes))
    tensors = {name: values for path in folder.glob("*.safetensors") for name, values in load_file(path).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    for number in range(2):
        if number:
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            save_file(tensors, folder / "model.safetensors")
        plan = plan_import(folder, config=None, tensor_parallel_size=1, accept_rounded_bias=False)
        with pytest.raises(FileError, match=f"^{folder}: MptForCausalLM of transformers .* fails on it: ") as caught:
            convert_from_hf(plan, tmp_path / "a")
        assert "\n" not in str(caught.value)
        (folder / "model.safetensors").unlink(missing_ok=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of what is old in torch
def test_tensors_of_other_kinds_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folders["mpt"] / "config.json").read_bytes())
    dense = torch.zeros(3, 3)
    for values in (
        dense.to_sparse(),
        dense.to("meta"),
        torch._neg_view(dense),
        torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        {"inner": dense},
    ):
        torch.save({"a": values}, tmp_path / "pytorch_model.bin")
        with pytest.raises(
            CheckpointError, match=r"pytorch_model\.bin (holds other|cannot be loaded as|would run code)"
        ):
            try_import(tmp_path)


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
    with pytest.raises(CheckpointError, match="holds other things than dense tensors by name"):
        try_import(folder)
    torch.save({"a": torch.zeros(3)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{path} cannot be loaded"):
        try_import(folder)
    assert not (tmp_path / "ran").exists()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        try_import(folder)
