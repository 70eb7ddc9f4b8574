"""What all ranks of a run must have in common before they compute together: code, versions, configuration and data."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import megalibi
from megalibi.config import BY_CONTENT, Config, flatten_config
from megalibi.data.tokens.identity import DataIdentity

_PACKAGES = ("torch", "deepspeed", "numpy", "triton", "flash-attn")
"""The packages that decide what is computed; ranks must have the same versions of them."""
_OUR_PACKAGES = ("megalibi", "alibi_attention", "fused_ops")
"""The packages of this project, of which ranks must have the same sources."""
_SOURCES = ("*.py", "*.cpp", "*.h")


def describe_facts(config: Config, data: DataIdentity) -> dict[str, str]:
    """Return what all ranks must have in common, by name, for parallel.check_same to compare."""
    facts = {"the version of megalibi": megalibi.__version__, "the code of megalibi": f"sha256 {_hash_code()[:12]}"}
    facts["the version of python"] = ".".join(platform.python_version_tuple()[:2])
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            facts[f"the version of {package}"] = version(package)
    # Files are known by what they hold: a host may have them elsewhere.
    facts |= {name: str(value) for name, value in flatten_config(config).items() if name not in BY_CONTENT}
    for name, split, identities in (
        ("data.train", config.data.train, data.train),
        ("data.valid", config.data.valid, data.valid),
    ):
        facts[f"the number of token files of {name}"] = str(len(split))
        for number, (dataset, identity) in enumerate(zip(split, identities, strict=True)):
            facts[f"{name}[{number}]"] = (
                f"of weight {dataset.weight}, {identity.tokens:,} tokens in {identity.documents:,} documents, "
                f"sha256 of .idx {identity.idx_sha256[:12]}, of .bin {identity.bin_sha256[:12]}"
            )
    facts["the tokenizer's sha256"] = str(data.tokenizer_sha256)
    return facts


@cache
def _hash_code() -> str:
    """Return a checksum of the sources of our packages: hosts may have other checkouts of one version."""
    digest = hashlib.sha256()
    for name, path in sorted(_find_sources().items()):
        digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _find_sources() -> dict[str, Path]:
    """Return the source files of our packages by the name that they have on every host, such as megalibi/log.py."""
    folders = [Path(str(find_spec(package).origin)).parent for package in _OUR_PACKAGES]  # type: ignore[union-attr]
    found = [(folder, path) for folder in folders for pattern in _SOURCES for path in folder.rglob(pattern)]
    return {path.relative_to(folder.parent).as_posix(): path for folder, path in found}
