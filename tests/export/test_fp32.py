from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from megalibi.config import load_config
from megalibi.export.certificate import CERTIFICATE, hash_tensor
from megalibi.export.fp32 import convert_to_fp32
from tests.support.conversions import configure_model, write_random


def test_every_tensor_is_there_once_whole_and_with_its_bits(tmp_path: Path) -> None:
    """Of two tensor ranks and a padded vocabulary, in several files, with a tied output layer."""
    checkpoint, weights = write_random(tmp_path / "a", configure_model("bloom", tensor=2))
    convert_to_fp32(checkpoint, tmp_path / "b", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert json.loads(index["metadata"]["ties"]) == {"output.weight": "embedding.weight"}
    assert index["metadata"]["total_size"] == 4 * sum(values.numel() for values in weights.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 2
    certificate = json.loads((tmp_path / "b" / CERTIFICATE).read_text())
    records = {record["target"]: record for record in certificate["tensors"]}
    for name, values in weights.items():
        with safe_open(tmp_path / "b" / index["weight_map"][name], framework="pt") as file:
            assert torch.equal(file.get_tensor(name), values)
        assert records[name]["source_sha256"] == records[name]["target_sha256"] == hash_tensor(values)
    assert certificate["source"]["manifest_sha256"] == checkpoint.manifest.checksum
    assert load_config(tmp_path / "b" / "config.yaml") == checkpoint.config
