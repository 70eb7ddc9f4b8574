"""PREFIX.json beside a token file: which tokenizer made it, and of what.

The format of .bin and .idx does not record that, so that ids of one vocabulary would pass for those of another.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megalibi
from megalibi.data.text.documents import DocumentReader
from megalibi.data.text.sources import RECORD_HEAD
from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.words import WordTokenizer
from megalibi.data.tokens.identity import DataIdentity, Identity
from megalibi.data.tokens.token_file import TokenFile, check_token_ids
from megalibi.errors import DataError
from megalibi.log import get_logger

_LOGGER = get_logger(__name__)
_FORMAT = "megalibi token file, 1"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What PREFIX.json says."""

    identity: Identity
    """The identity of the token file that it describes."""
    tokenizer: dict[str, Any]
    """The tokenizer's path, sha256 and vocab_size."""
    sources: list[dict[str, Any]]
    """The name, size_bytes and documents of each source, and the numbers of what was left out: empty, bad_records."""
    options: dict[str, Any]
    """The options text_key and text_unit with which the text was read."""
    characters: int
    """The number of characters in the text."""
    lost_characters: int
    """The characters for which the tokenizer has no id: the ids stand for a text without them."""
    versions: dict[str, str]
    """The versions of megalibi and of sentencepiece that made it."""


def identify_data(
    train: Sequence[TokenFile], valid: Sequence[TokenFile], tokenizer: Tokenizer | WordTokenizer | None
) -> DataIdentity:
    """Return what a run learns from, after a check that one tokenizer made all of it.

    Args:
        train: Token files to train on.
        valid: Token files to validate on.
        tokenizer: What the user says that made them; None: nothing.

    Raises:
        DataError: Another tokenizer made some of it, or an id is past the tokenizer's vocabulary.
    """
    if tokenizer is not None:
        for token_file in (*train, *valid):
            check_token_ids(token_file, tokenizer.vocab_size)
    return DataIdentity(
        tokenizer_sha256=check_tokenizer([*train, *valid], tokenizer, "data.tokenizer"),
        train=tuple(token_file.identity for token_file in train),
        valid=tuple(token_file.identity for token_file in valid),
    )


def check_tokenizer(
    token_files: Sequence[TokenFile], tokenizer: Tokenizer | WordTokenizer | None, option: str
) -> str | None:
    """Return the sha256 of the tokenizer that made all token files; None: it is not known.

    Args:
        token_files: Those of one run.
        tokenizer: What the user says that made them; None: nothing.
        option: The field or option that named it.

    Raises:
        DataError: More than one tokenizer made them.
    """
    made_by: dict[str, str] = {} if tokenizer is None else {tokenizer.fingerprint: f"{option}={tokenizer.path}"}
    for token_file in token_files:
        provenance = read_provenance(token_file)
        if provenance is None:
            continue
        made = provenance.tokenizer
        made_by.setdefault(made["sha256"], f"{made['path']} in {token_file.prefix}.json")
        if len(made_by) > 1:
            one, other = (f"{name} (sha256 {sha256[:12]})" for sha256, name in made_by.items())
            raise DataError(
                f"{token_file.prefix} was made with another tokenizer: {one} is not {other}; give the one that made "
                "the tokens, or tokenize the text again"
            )
    return next(iter(made_by), None)


def say_unrecorded(prefixes: Iterable[str]) -> None:
    """Say of which token files it is not known which tokenizer made them."""
    for prefix in prefixes:
        if _read(provenance_path(prefix)) is None:
            _LOGGER.warning(
                "it is not known which tokenizer made %s: beside it is no %s, which megalibi preprocess writes",
                prefix,
                provenance_path(prefix).name,
            )


def describe_token_file(
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
        identity=TokenFile(prefix).identity,
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
        DataError: There is such a file.
    """
    path = provenance_path(prefix)
    if path.exists() and _read(path) is None:
        raise DataError(
            f"{path} exists and does not describe a token file, and preprocessing would write over it: choose another "
            "--output"
        )


def read_provenance(token_file: TokenFile) -> Provenance | None:
    """Return what PREFIX.json says of a token file; None: there is none, as beside the files of other programs.

    Raises:
        DataError: It is damaged or describes another token file.
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
        made_by = provenance.tokenizer["path"]
    except (TypeError, KeyError) as error:
        raise DataError(f"{path}: damaged or of another version ({error}); make the token file again") from error
    if not (isinstance(sha256, str) and isinstance(made_by, str) and isinstance(vocab_size, int)):
        raise DataError(f"{path}: damaged, its tokenizer is {provenance.tokenizer}; make the token file again")
    if provenance.identity != token_file.identity:
        raise DataError(
            f"{path} describes another token file than the one beside it: make the token file again with "
            "megalibi preprocess --overwrite, or delete the .json if the tokens are the right ones"
        )
    return provenance


def _read(path: Path) -> dict[str, Any] | None:
    """Return the fields of a provenance, none if it is damaged; None if the file is another one, or is not there."""
    content = b""
    try:
        content = path.read_bytes()
        fields = json.loads(content)
    except (OSError, ValueError, RecursionError):
        return {} if content.startswith(RECORD_HEAD) else None
    if not isinstance(fields, dict) or fields.pop("format", None) != _FORMAT:
        return None
    return fields
