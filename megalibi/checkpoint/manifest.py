"""What a checkpoint says of itself: the run, every parameter, and its files with sizes and checksums.

``manifest.json`` has a checksum of its own in ``manifest.sha256`` beside it, so that a flipped byte in any file of a
checkpoint shows. docs/formats.md describes the fields for readers in other languages.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalibi.checkpoint.parameters import ParameterEntry
from megalibi.errors import CheckpointError, FileError, describe_os_error
from megalibi.files import write_synced
from megalibi.metrics.records import RollbackRecord, record_from_fields

MANIFEST = "manifest.json"
MANIFEST_CHECKSUM = "manifest.sha256"
FORMAT_VERSION = 3
"""In format 3 the files are ours and fit any topology; in 1 and 2 they are DeepSpeed's. Format 2 describes the
parameters; format 1 does not, and has no ``format_version``."""
_ONE_LINE_EACH = ("files", "parameters")
_TOPOLOGY = ("world_size", "tensor_parallel_size", "data_parallel_size", "zero_stage")
_AT_LEAST_ONE = (*_TOPOLOGY[:3], "padded_vocab_size")
_TOO_LARGE = 2**63
_MAX_REASON = 300
"""The most letters of what is wrong, which can be a value of the file."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint."""

    size_bytes: int
    """The file's size in bytes."""
    sha256: str
    """The SHA-256 of its content, in hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is, what it holds, and which files it has."""

    format_version: int = FORMAT_VERSION
    """The version of this description."""
    step: int
    """The number of optimizer steps done."""
    samples_consumed: int
    """The position in the training data: samples that the steps have used."""
    topology: dict[str, int]
    """The number of ranks, the tensor parallel and data parallel sizes, and the ZeRO stage of the run that wrote it."""
    config: dict[str, Any]
    """The run's configuration, by section."""
    derived: dict[str, Any]
    """What followed from the configuration on that number of ranks."""
    versions: dict[str, str]
    """The versions of megalibi and of the packages that computed what the files hold."""
    files: dict[str, FileEntry]
    """The files, by their path inside the checkpoint."""
    data: dict[str, Any] = field(default_factory=dict)
    """The content of the training and validation text, a DataIdentity; empty in checkpoints older than this field."""
    run_id: str = ""
    """The identity of the run that wrote it; empty in checkpoints older than this field."""
    parameters: dict[str, ParameterEntry] = field(default_factory=dict)
    """Every parameter by name, in the order of the model; empty in format 1."""
    ties: dict[str, str] = field(default_factory=dict)
    """Further names of parameters that have several: a tied output layer is that of the embedding."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """The optimizer's ``kind``, and what it has done: the fields of OptimizerProgress. Empty in formats 1 and 2."""
    rollbacks: tuple[RollbackRecord, ...] = ()
    """The loss spikes that took the run back so far; what they left out stays left out."""

    @property
    def checksum(self) -> str:
        """The SHA-256 of what the manifest says; that of its file, if this version of megalibi wrote it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Return the text of ``manifest.json``: a file and a parameter take a line each."""
        parts = []
        for name, value in dataclasses.asdict(self).items():
            if name in _ONE_LINE_EACH and value:
                lines = (f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items())
                text = "{\n" + ",\n".join(lines) + "\n }"
            else:
                text = json.dumps(value, indent=1).replace("\n", "\n ")
            parts.append(f" {json.dumps(name)}: {text}")
        return "{\n" + ",\n".join(parts) + "\n}\n"


def spell_topology(topology: Mapping[str, int]) -> str:
    """Return a topology in words: ``tensor 2 x data 4, ZeRO 1``."""
    return "tensor {tensor_parallel_size} x data {data_parallel_size}, ZeRO {zero_stage}".format(**topology)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest and its checksum into a folder that is not yet a checkpoint, and wait for the disk.

    Raises:
        OSError: The disk is full or fails.
    """
    text = manifest.to_json().encode()
    write_synced(folder / MANIFEST, text)
    write_synced(folder / MANIFEST_CHECKSUM, hashlib.sha256(text).hexdigest().encode())


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check the manifest of a checkpoint, but not the files it lists.

    Args:
        checkpoint: A step's folder.

    Raises:
        CheckpointError: The folder is no checkpoint, or its manifest is damaged or of a later version.
        FileError: The manifest may not be read.
    """
    try:
        text = (checkpoint / MANIFEST).read_bytes()
        expected = (checkpoint / MANIFEST_CHECKSUM).read_bytes().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{checkpoint} is no complete checkpoint: {describe_os_error(error, checkpoint)}; give the path of a "
            "folder named step_NNNNNNNN"
        ) from error
    except OSError as error:
        raise FileError(describe_os_error(error, checkpoint / MANIFEST)) from error
    if hashlib.sha256(text).hexdigest() != expected:
        raise CheckpointError(
            f"{checkpoint / MANIFEST} is damaged: it does not match {MANIFEST_CHECKSUM}; resume from another checkpoint"
        )
    try:
        return _parse(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{checkpoint / MANIFEST} was not written by this version of megalibi: {str(error)[:_MAX_REASON]}; use the "
            "version that wrote it, or another checkpoint"
        ) from error


def _parse(fields: dict[str, Any]) -> Manifest:
    version = fields.pop("format_version", 1)
    if version not in range(1, FORMAT_VERSION + 1):
        raise ValueError(f"format_version={version!r}: must be from 1 to {FORMAT_VERSION}")
    files = {name: FileEntry(**entry) for name, entry in fields.pop("files").items()}
    for name in files:
        if Path(name).name != name:  # none may lead out of the folder
            raise ValueError(f"file {name!r}: must be a name without a folder")
    described = fields.pop("parameters", {})
    parameters = {name: ParameterEntry.from_fields(entry) for name, entry in described.items()}
    rollbacks = tuple(record_from_fields(RollbackRecord, entry) for entry in fields.pop("rollbacks", ()))
    manifest = Manifest(**fields, format_version=version, files=files, parameters=parameters, rollbacks=rollbacks)
    _check_types(manifest)
    return manifest


def _check_types(manifest: Manifest) -> None:
    """Check the types of what readers take for granted: a manifest can be written anew to fit other files.

    Raises:
        ValueError: A field is of another type, or a topology of other sizes.
    """
    for name in ("config", "derived", "versions", "data", "ties", "optimizer", "topology"):
        if not isinstance(getattr(manifest, name), dict):
            raise ValueError(f"{name}: must be an object")
    sizes = {name: manifest.topology.get(name, -1) for name in _TOPOLOGY}
    counts: dict[str, Any] = {"step": manifest.step, "samples_consumed": manifest.samples_consumed, **sizes}
    if manifest.format_version == 1:
        counts["padded_vocab_size"] = manifest.derived.get("padded_vocab_size")
    counts |= {f"size_bytes of {name}": entry.size_bytes for name, entry in manifest.files.items()}
    for name, count in counts.items():
        least = 1 if name in _AT_LEAST_ONE else 0
        if type(count) is not int or not least <= count < _TOO_LARGE:
            raise ValueError(f"{name}={count!r}: must be a whole number of at least {least}")
    if sizes["world_size"] != sizes["tensor_parallel_size"] * sizes["data_parallel_size"]:
        raise ValueError(f"world_size={sizes['world_size']}: must be tensor_parallel_size x data_parallel_size")
    texts = {**manifest.versions, **manifest.ties, "run_id": manifest.run_id}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name}={text!r}: must be a text")
