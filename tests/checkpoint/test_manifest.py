from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from megalibi.checkpoint.manifest import FORMAT_VERSION, FileEntry, Manifest, read_manifest, write_manifest
from megalibi.checkpoint.parameters import build_without_memory, describe_parameters, find_ties
from megalibi.checkpoint.tensors.state_file import name_state_file
from megalibi.config import config_from_dict, config_to_dict
from megalibi.engine.build import DTYPES
from megalibi.errors import CheckpointError
from tests.support.checkpoints import save_files

LARGEST_BYTES = 64 * 1024
"""For 24 layers, with biases: a manifest is read by every rank before anything else."""


def describe_large_model() -> Manifest:
    """Return the manifest of a model of 24 layers with everything that has parameters, on 2 x 4 ranks."""
    config = config_from_dict(
        {
            "model": {"num_layers": 24, "hidden_size": 2048, "num_attention_heads": 16, "ffn_hidden_size": 8192,
                      "vocab_size": 50_257, "bias": True, "position_method": "t5_bias"},
            "data": {"train": "text", "seq_length": 2048},
            "optimizer": {"learning_rate": 1e-3},
            "train": {"steps": 9, "global_batch_size": 8, "micro_batch_size": 2, "output_dir": "run"},
        }
    )  # fmt: skip
    model = build_without_memory(config, padded_vocab_size=50_432, tensor_parallel_size=2)
    ranks = [(tensor, data) for tensor in range(2) for data in range(4)]
    names = [name_state_file("optimizer", tensor, data) for tensor, data in ranks]
    return Manifest(
        step=9,
        samples_consumed=72,
        topology={"world_size": 8, "tensor_parallel_size": 2, "data_parallel_size": 4, "zero_stage": 1},
        config=config_to_dict(config),
        derived={"padded_vocab_size": 50_432},
        versions={"megalibi": "1"},
        files={name: FileEntry(size_bytes=1 << 33, sha256="a" * 64) for name in names},
        parameters=describe_parameters(model, DTYPES["bf16"]),
        ties=find_ties(model),
    )


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    manifest = describe_large_model()
    write_manifest(tmp_path, manifest)
    read = read_manifest(tmp_path)
    assert read == manifest
    assert list(read.parameters) == list(manifest.parameters)
    assert read.ties == {"output.weight": "embedding.weight"}


def test_a_manifest_stays_small_and_has_a_line_for_each_file_and_parameter(tmp_path: Path) -> None:
    manifest = describe_large_model()
    text = manifest.to_json()
    assert len(text) < LARGEST_BYTES
    assert json.loads(text) == json.loads(json.dumps(dataclasses.asdict(manifest)))
    lines = text.splitlines()
    assert (
        '  "blocks.23.attention.qkv.weight": {"shape": [6144, 2048], "dtype": "bfloat16", "shard": {"dim": 0, '
        '"full_size": 6144, "parts": 3, "padding": 0}},' in lines
    )
    assert '  "blocks.0.attention_norm.weight": {"shape": [2048], "dtype": "bfloat16", "shard": null},' in lines
    for name in (*manifest.files, *manifest.parameters):
        assert sum(line.startswith(f'  "{name}": {{') and line.rstrip(",").endswith("}") for line in lines) == 1


def write_text(checkpoint: Path, text: str) -> None:
    """Replace a manifest by another with its checksum."""
    (checkpoint / "manifest.json").write_text(text)
    (checkpoint / "manifest.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())


def test_a_manifest_of_another_version_is_one_line(tmp_path: Path) -> None:
    checkpoint = save_files(tmp_path, 1)
    for text in ('{"step": 1}', "[]", '{"files": {"a.pt": {"size": 1}}}', "no JSON"):
        write_text(checkpoint, text)
        with pytest.raises(CheckpointError, match=r"manifest\.json was not written by this version of megalibi: "):
            read_manifest(checkpoint)


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, "2", None])
def test_a_format_of_the_future_is_refused_by_its_number(tmp_path: Path, version: Any) -> None:
    checkpoint = save_files(tmp_path, 1)
    fields = json.loads((checkpoint / "manifest.json").read_text())
    assert fields["format_version"] == FORMAT_VERSION
    write_text(checkpoint, json.dumps({**fields, "format_version": version, "of_the_future": 1}))
    with pytest.raises(CheckpointError) as refusal:
        read_manifest(checkpoint)
    assert str(refusal.value) == (
        f"{checkpoint / 'manifest.json'} was not written by this version of megalibi: format_version={version!r}: must "
        f"be from 1 to {FORMAT_VERSION}; use the version that wrote it, or another checkpoint"
    )


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [4, 4], "dtype": "object", "shard": None},
        {"shape": [4, 0], "dtype": "float32", "shard": None},
        {"shape": [4, 4], "dtype": "float32"},
        {"shape": [4, 4], "dtype": "float32", "shard": {"dim": 0, "full_size": 5}},
        {"shape": [4, 4], "dtype": "float32", "shard": {"dim": 2, "full_size": 4}},
        {"shape": [4, 4], "dtype": "float32", "shard": {"dim": -1, "full_size": 4}},
        {"shape": [4, 4], "dtype": "float32", "shard": {"dim": 0, "full_size": 4, "parts": 0}},
        {"shape": "ab", "dtype": "float32", "shard": None},
        "float32",
    ],
)
def test_a_parameter_that_cannot_be_is_one_line(tmp_path: Path, entry: Any) -> None:
    checkpoint = save_files(tmp_path, 1)
    fields = json.loads((checkpoint / "manifest.json").read_text())
    write_text(checkpoint, json.dumps({**fields, "parameters": {"embedding.weight": entry}}))
    with pytest.raises(CheckpointError, match=r"manifest\.json was not written by this version of megalibi: "):
        read_manifest(checkpoint)
