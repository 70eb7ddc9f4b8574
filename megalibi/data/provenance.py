"""PREFIX.json beside a token file: which tokenizer made it, of what; and what tells one token file from another.

The format of .bin and .idx records neither, so that ids of one vocabulary would pass for those of another, and a file
that was made again for the one before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megalibi
from megalibi.config import ConfigError
from megalibi.data.text import DocumentReader
from megalibi.data.token_file import TokenFile
from megalibi.data.tokenizer import Tokenizer
from megalibi.data.words import WordTokenizer

_FORMAT = "megalibi token file, 1"
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What tells a token file from others: another text or tokenizer gives another one, another path does not."""

    tokens: int
    """Tokens of all documents."""
    documents: int
    """Documents."""
    idx_sha256: str
    """Of the index: of all of it up to 4 MiB, of 64 places spread evenly over a larger one."""
    bin_sha256: str
    """Of the tokens, likewise."""


def identify(token_file: TokenFile) -> Identity:
    """Return what tells a token file from others; reads 8 MiB at most."""
    return Identity(
        tokens=token_file.num_tokens,
        documents=token_file.num_documents,
        idx_sha256=_sampled_sha256(token_file.idx_path),
        bin_sha256=_sampled_sha256(token_file.bin_path),
    )


def _sampled_sha256(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(size - _SAMPLE_BYTES, 0)
    with path.open("rb") as file:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        for sample in range(_SAMPLES):
            file.seek(last * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What PREFIX.json says."""

    identity: Identity
    """Of the token file that it describes."""
    tokenizer: dict[str, Any]
    """Path, sha256 and vocab_size."""
    sources: list[dict[str, Any]]
    """Name, size_bytes, documents, and what was left out: empty, bad_records."""
    options: dict[str, Any]
    """Of preprocess_data.py: text_key and text_unit."""
    characters: int
    """Of the text."""
    lost_characters: int
    """Those for which the tokenizer has no id, so that the ids stand for another text."""
    versions: dict[str, str]
    """Of megalibi and of sentencepiece."""


def describe(
    prefix: str,
    tokenizer: Tokenizer | WordTokenizer,
    reader: DocumentReader,
    *,
    options: dict[str, Any],
    characters: int,
    lost_characters: int,
) -> Provenance:
    """Return what is to be said of a token file that was just written."""
    return Provenance(
        identity=identify(TokenFile(prefix)),
        tokenizer={"path": tokenizer.path, "sha256": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        sources=[count.to_dict() for count in reader.counts],
        options=options,
        characters=characters,
        lost_characters=lost_characters,
        versions={"megalibi": megalibi.__version__, "sentencepiece": version("sentencepiece")},
    )


def provenance_path(prefix: str) -> Path:
    """Return where the provenance of a token file stands."""
    return Path(f"{prefix}.json")


def to_json(provenance: Provenance) -> str:
    """Return the content of PREFIX.json."""
    return json.dumps({"format": _FORMAT, **dataclasses.asdict(provenance)}, indent=1) + "\n"


def check_replaceable(prefix: str) -> None:
    """Refuse to write PREFIX.json over a file of that name that says something else, such as the text itself.

    Raises:
        ConfigError: There is such a file.
    """
    path = provenance_path(prefix)
    if path.exists() and _read(path) is None:
        raise ConfigError(
            f"{path} exists and is no record of a token file, and preprocessing would write one there: choose another "
            "--output"
        )


def read_provenance(token_file: TokenFile) -> Provenance | None:
    """Return what PREFIX.json says of a token file; None: there is none, as beside the files of other programs.

    Raises:
        ConfigError: It is damaged or describes another token file.
    """
    path = provenance_path(token_file.prefix)
    if not path.exists():
        return None
    fields = _read(path)
    if fields is None:
        return None  # a file of somebody's that has that name
    try:
        provenance = Provenance(**{**fields, "identity": Identity(**fields["identity"])})
        sha256, vocab_size = provenance.tokenizer["sha256"], provenance.tokenizer["vocab_size"]
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{path}: damaged or of another version ({error}); make the token file again") from error
    if not isinstance(sha256, str) or not isinstance(vocab_size, int):
        raise ConfigError(f"{path}: damaged, its tokenizer is {provenance.tokenizer}; make the token file again")
    if provenance.identity != identify(token_file):
        raise ConfigError(
            f"{path} describes another token file than the one beside it: make the token file again with "
            "tools/preprocess_data.py --overwrite, or delete the .json if the tokens are the right ones"
        )
    return provenance


def _read(path: Path) -> dict[str, Any] | None:
    """Return the fields of a provenance; None if the file is none."""
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or fields.pop("format", None) != _FORMAT:
        return None
    return fields
