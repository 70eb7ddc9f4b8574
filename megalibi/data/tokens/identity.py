"""What tells one token file from another, so that one that was made again does not pass for the one before."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WHOLE_BYTES = 1 << 26
_SAMPLES = 256
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What tells a token file from others: another text or tokenizer gives another one, another path does not."""

    tokens: int
    """The number of tokens in all documents."""
    documents: int
    """The number of documents in the token file."""
    idx_sha256: str
    """The checksum of the index: of all of it up to 64 MiB, of 256 places spread evenly over a larger one."""
    bin_sha256: str
    """The checksum of the .bin file, taken as that of the index is."""


def sampled_sha256(path: Path) -> str:
    """Return the checksum of a file and of its size: of all of it, or of places of a large one (see Identity)."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(size - _SAMPLE_BYTES, 0)
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        for sample in range(_SAMPLES):
            file.seek(last * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class DataIdentity:
    """What a run learns from, wherever it stands; a checkpoint remembers it."""

    tokenizer_sha256: str | None
    """The checksum of the tokenizer that made all of it; None where that is not known."""
    train: tuple[Identity, ...]
    """The identities of the token files of data.train, in their order."""
    valid: tuple[Identity, ...]
    """The identities of the token files of data.valid, in their order."""

    def to_dict(self) -> dict[str, Any]:
        """Return the identity as a manifest has it."""
        return {
            "tokenizer_sha256": self.tokenizer_sha256,
            "train": [dataclasses.asdict(identity) for identity in self.train],
            "valid": [dataclasses.asdict(identity) for identity in self.valid],
        }
