"""The weights alone, whole and in fp32, by our own names: consolidated safetensors for whoever wants to read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalibi.checkpoint import Checkpoint
from megalibi.checkpoint.parameters import build_without_memory, find_ties
from megalibi.checkpoint.tensors.safetensors_header import HeaderEntry
from megalibi.config import save_config
from megalibi.export.certificate import (
    CERTIFICATE,
    Certificate,
    TensorRecord,
    check_tensor_finite,
    compare_slopes,
    describe_software,
    hash_tensor,
    write_certificate,
)
from megalibi.export.judge import check_equal
from megalibi.export.output import MAX_SHARD_BYTES, TensorFolder, read_back
from megalibi.model import model_slopes
from megalibi.partial import writing_folder

CONFIG_FILE = "config.yaml"


def list_ties(checkpoint: Checkpoint) -> dict[str, str]:
    """Return further names of parameters that have several, each with the first name of the same parameter."""
    if checkpoint.manifest.format_version > 2:
        return checkpoint.manifest.ties
    manifest = checkpoint.manifest
    model = build_without_memory(
        checkpoint.config,
        padded_vocab_size=manifest.derived["padded_vocab_size"],
        tensor_parallel_size=manifest.topology["tensor_parallel_size"],
    )
    return find_ties(model)


def describe_source(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a certificate says of a checkpoint that was read."""
    manifest = checkpoint.manifest
    return {
        "path": str(checkpoint.path),
        "step": manifest.step,
        "run_id": manifest.run_id,
        "manifest_sha256": manifest.checksum,
        "versions": manifest.versions,
    }


def convert_to_fp32(
    checkpoint: Checkpoint,
    output: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    show: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Certificate:
    """Write the fp32 weights that the optimizer steps on into a new folder, tensor by tensor; one is in memory at once.

    Args:
        checkpoint: The checkpoint, of any format and topology.
        output: The new folder.
        max_shard_bytes: The most bytes of tensors in a file.
        show: Called before each tensor with its name, the number of those done, and of all.

    Returns:
        What came out, as ``certificate.json`` in the folder has it.

    Raises:
        CheckpointError: A file is missing, damaged, would run code, or does not hold what the manifest says.
        FileError: A file may not be read, or the disk does not give back what was written.
        OSError: The disk is full or fails.
    """
    checkpoint.verify()
    saved, ties = checkpoint.read_state(), list_ties(checkpoint)
    entries = [HeaderEntry(name, "F32", entry.shape) for name, entry in checkpoint.parameters.items()]
    metadata = {"format": "pt", "ties": json.dumps(ties)}
    with writing_folder(output) as folder:
        tensors = TensorFolder(folder, entries, max_shard_bytes=max_shard_bytes, metadata=metadata)
        hashes = {}
        for done, entry in enumerate(entries):
            show(entry.name, done, len(entries))
            values = saved.read_whole(entry.name)
            check_tensor_finite(entry.name, values)
            hashes[entry.name] = hash_tensor(values)
            tensors.write(values)
        tensors.close()
        save_config(checkpoint.config, folder / CONFIG_FILE)
        records = [
            TensorRecord(
                source=name,
                target=name,
                source_sha256=hashes[name],
                target_sha256=(sha256 := hash_tensor(values)),
                bit_equal=sha256 == hashes[name],
            )
            for name, values in read_back(folder, tensors.files)
        ]
        check_equal(records, output)
        model = checkpoint.config.model
        certificate = Certificate(
            versions=describe_software(),
            source=describe_source(checkpoint),
            target={"format": "safetensors", "dtype": "float32"},
            tensors=records,
            ties=ties,
            slopes=compare_slopes(model_slopes(model), None) if model.position_method == "alibi" else None,
            not_compared="consolidated weights have no software of their own",
        )
        write_certificate(certificate, folder / CERTIFICATE)
    return certificate
