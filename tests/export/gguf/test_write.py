from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from megalibi.checkpoint import Checkpoint
from megalibi.errors import CheckpointError, ConfigError, FileError
from megalibi.export.gguf.architectures import compute_llama_slopes, rename_for_gguf
from megalibi.export.gguf.write import check_gguf, convert_to_gguf
from megalibi.model import model_slopes
from tests.export.gguf.checkpoints import BLOOM, VOCAB_SIZE, load_portable, make_checkpoint
from tests.support.models import make_model

Q8_RELATIVE_BOUND = 0.5 / 127 + 2**-11
"""Of a block's largest number: half a step, and what the step loses in half precision."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def mpt(folder: Path) -> Checkpoint:
    return make_checkpoint(folder / "mpt", tensor=2)


@pytest.fixture(scope="module")
def bloom(folder: Path) -> Checkpoint:
    return make_checkpoint(folder / "bloom", num_attention_heads=8, tie_embeddings=False, **BLOOM)


def convert(checkpoint: Checkpoint, output: Path, kind: str, **options: Any) -> dict[str, Any]:
    convert_to_gguf(checkpoint, output, load_portable(checkpoint), kind=kind, compare=False, **options)
    certificate: dict[str, Any] = json.loads(Path(f"{output}.certificate.json").read_text())
    return certificate


def read_values(tensor: Any) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type))


def check_values(read: Tensor, values: Tensor, kind: str) -> None:
    if values.dim() == 1 or kind == "f32":
        assert torch.equal(read, values)
    elif kind == "f16":
        assert torch.equal(read, values.half().float())
    else:
        largest = values.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
        assert ((read - values).unflatten(-1, (-1, 32)).abs() <= Q8_RELATIVE_BOUND * largest).all()


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("architecture", ["mpt", "bloom"])
def test_the_file_has_every_tensor(
    mpt: Checkpoint, bloom: Checkpoint, tmp_path: Path, architecture: str, kind: str
) -> None:
    checkpoint = {"mpt": mpt, "bloom": bloom}[architecture]
    certificate = convert(checkpoint, tmp_path / "m.gguf", kind)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert [record["target"] for record in certificate["tensors"]] == list(tensors)
    assert len(tensors) == len(checkpoint.parameters)
    weights, records = checkpoint.read_state(), {record["source"]: record for record in certificate["tensors"]}
    for name in checkpoint.parameters:
        values, tensor = weights.read_whole(name), tensors[rename_for_gguf(name)]
        check_values(read_values(tensor), values, kind)
        assert records[name]["bit_equal"]
        assert records[name]["largest_difference"] == (read_values(tensor) - values).abs().max().item()
        assert (records[name]["largest_difference"] > 0) == (values.dim() > 1 and kind != "f32")
        assert records[name]["source_sha256"] == hashlib.sha256(values.numpy().tobytes()).hexdigest()
        assert records[name]["target_sha256"] == hashlib.sha256(np.array(tensor.data).tobytes()).hexdigest()
    assert certificate["slopes"]["largest_difference"] < 1e-6
    assert certificate["comparison"] is None
    assert certificate["not_compared"].startswith(("--no-compare was given", "llama-cpp-python is not installed"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "m.gguf.certificate.json"]


def test_the_file_says_what_llama_cpp_needs(mpt: Checkpoint, bloom: Checkpoint, tmp_path: Path) -> None:
    for name, checkpoint, heads in (("mpt", mpt, 12), ("bloom", bloom, 8)):
        convert(checkpoint, tmp_path / name, "f16")
        fields = gguf.GGUFReader(tmp_path / name).fields
        said = {key: field.contents() for key, field in fields.items()}
        assert said["general.architecture"] == name
        assert said["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
        sizes = {"embedding_length": 96, "block_count": 2, "feed_forward_length": 192, "context_length": 64}
        for key, value in {**sizes, "attention.head_count": heads, "attention.max_alibi_bias": 8.0}.items():
            assert said[f"{name}.{key}"] == value
        assert math.isclose(said[f"{name}.attention.layer_norm_epsilon"], 1e-5, rel_tol=1e-6)
        assert said["tokenizer.ggml.model"] == "llama"
        assert said["tokenizer.ggml.add_space_prefix"] is False
        assert said["tokenizer.ggml.add_bos_token"] is False
        assert said["tokenizer.ggml.eos_token_id"] == 1
        pieces, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
        assert len(pieces) == len(kinds) == len(said["tokenizer.ggml.scores"]) == VOCAB_SIZE
        assert (pieces[1], kinds[1]) == ("</s>", gguf.TokenType.CONTROL)
        assert (pieces[-1], kinds[-1]) == ("<unused 419>", gguf.TokenType.UNUSED)


@pytest.mark.parametrize("num_heads", [1, 8, 12, 20, 64, 128])
def test_llama_cpp_has_the_slopes_of_the_paper(num_heads: int) -> None:
    slopes = model_slopes(make_model(num_attention_heads=num_heads, hidden_size=num_heads))
    torch.testing.assert_close(compute_llama_slopes(num_heads), slopes, rtol=1e-6, atol=0.0)


def test_llama_cpp_takes_powers_of_a_base_that_fp32_has_rounded() -> None:
    """By which its slopes are up to 7e-7 of a slope from the paper's."""
    base = torch.tensor(2.0 ** (-8 / 128), dtype=torch.float32).double()
    slopes = compute_llama_slopes(128)
    torch.testing.assert_close(slopes.double(), base ** torch.arange(1, 129), rtol=2e-7, atol=0.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_method": "rotary"}, "model.position_method=rotary: must be alibi for a GGUF file"),
        ({"scale_alibi": True}, "model.scale_alibi=true: must be false"),
        ({"final_norm": False}, "model.final_norm=false: must be true"),
        ({"activation": "relu"}, "model.activation=relu: must be gelu or gelu_tanh"),
        ({"adaptive_cutoffs": (10, 20)}, r"model.adaptive_cutoffs=\[10, 20\]: must be \[\]"),
        ({"embedding_norm": True}, "model.bias=false: must be true .* embedding norm"),
        ({"embedding_norm": True, "bias": True, "norm_bias": False}, "model.norm_bias=false: must be true"),
        ({"hidden_size": 48}, "model.hidden_size=48: must be a multiple of 32 for --type q8_0"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_gguf(make_model(**{"hidden_size": 64, **fields}), "q8_0")


def test_an_interruption_leaves_nothing(mpt: Checkpoint, tmp_path: Path) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        if done == total // 2:
            (partial,) = tmp_path.iterdir()
            assert partial.name.startswith("m.gguf.partial.")
            assert [path.name for path in partial.iterdir()] == ["model.gguf"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(mpt, tmp_path / "m.gguf", "f16", show=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_what_a_type_cannot_hold_is_refused(folder: Path, tmp_path: Path) -> None:
    for number, kind, message in (
        (1e8, "f16", "--type=f16: cannot hold embedding.weight, whose largest number is 1e[+]08"),
        (1e8, "q8_0", "--type=q8_0: cannot hold embedding.weight, whose largest number is 1e[+]08"),
        (torch.nan, "f32", "embedding.weight has 1 numbers that are not finite"),
    ):
        checkpoint = make_checkpoint(folder / f"of_{number}_{kind}", change={"embedding.weight": number})
        with pytest.raises(FileError, match=message):
            convert(checkpoint, tmp_path / "m.gguf", kind)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_slopes_that_the_file_does_not_say_are_found(
    mpt: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("megalibi.export.gguf.metadata.MAX_ALIBI_BIAS", 7.5)
    with pytest.raises(FileError, match=r"llama\.cpp computes other slopes than the source"):
        convert(mpt, tmp_path / "m.gguf", kind)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_has_come_to_exist_meanwhile_is_kept(mpt: Checkpoint, tmp_path: Path) -> None:
    def appear(name: str, done: int, total: int) -> None:
        (tmp_path / "m.gguf").write_text("another's")

    with pytest.raises(FileExistsError, match="meanwhile"):
        convert(mpt, tmp_path / "m.gguf", "f16", show=appear)
    assert (tmp_path / "m.gguf").read_text() == "another's"
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_damaged_checkpoint_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(folder / "damaged")
    victim = next(checkpoint.path.glob("weights_*"))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(CheckpointError, match=victim.name):
        convert(checkpoint, tmp_path / "m.gguf", "f32")
    assert list(tmp_path.iterdir()) == []
