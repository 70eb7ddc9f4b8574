"""What all ranks of a run must have in common before they compute together: code, versions, configuration and data."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version

import megalibi
from megalibi.config import BY_CONTENT, Config, flatten_config
from megalibi.data.tokens.identity import DataIdentity
from megalibi.metrics.provenance import hash_code

_PACKAGES = ("torch", "deepspeed", "numpy", "triton", "flash-attn")
"""The packages that decide what is computed; ranks must have the same versions of them."""


def describe_facts(config: Config, data: DataIdentity) -> dict[str, str]:
    """Return what all ranks must have in common, by name, for parallel.check_same to compare."""
    facts = {"the version of megalibi": megalibi.__version__, "the code of megalibi": f"sha256 {hash_code()[:12]}"}
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
