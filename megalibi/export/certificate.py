"""What came out of a conversion: ``certificate.json``, in the folder that it wrote.

It has the checksum of every tensor before and after, the slopes of both sides, and how far the logits of source and
target are apart where the target's own software could be run. What was not compared is said, and never claimed.
docs/formats.md describes the fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import megalibi
from megalibi.errors import FileError
from megalibi.files import write_json

CERTIFICATE = "certificate.json"
CERTIFICATE_VERSION = 2


def describe_command() -> list[str]:
    """Return the words of this process's command line, the program by its name alone."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def describe_date() -> str:
    """Return the time in UTC, to the second."""
    return time.strftime("%FT%TZ", time.gmtime())


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One tensor before and after a conversion."""

    source: str
    """The tensor's name in the source."""
    target: str
    """The tensor's name in the target."""
    source_sha256: str
    """The SHA-256 of the tensor's bytes before, whole, in fp32, little-endian and row-major."""
    target_sha256: str
    """The SHA-256 of the tensor's bytes after, read back from the file that was written, in the target's type."""
    bit_equal: bool
    """Whether what was read back, put into the source's order, has the source's bits, rounded to the target's type."""
    largest_difference: float | None = None
    """The largest absolute difference that rounding made to a number; None: the action rounds nothing."""


@dataclass(frozen=True, kw_only=True)
class SlopeTables:
    """The slope of each attention head on both sides."""

    source: list[float] | None
    """The slopes that the source's own code computes, by head; None: it could not be asked."""
    target: list[float] | None
    """The slopes that the target's own function computes, by head, or, for GGUF, megalibi by llama.cpp's formula;
    None: it could not be asked."""
    largest_difference: float | None
    """The largest difference of two slopes of one head, relative to the source's; None: one side was not asked."""


@dataclass(frozen=True, kw_only=True)
class LogitComparison:
    """Source and target on the same tokens, each run by its own software."""

    software: str
    """What ran the target, with its version."""
    text: str
    """What the tokens are: a text and its tokenizer, or random numbers and their seed."""
    tokens: int
    """The number of tokens, twice the training length, where wrong slopes would show."""
    largest_logit_difference: float
    """The largest absolute difference of two logits, each row less its mean, which no probability depends on."""
    source_perplexity: float
    """The perplexity of the tokens under the source."""
    target_perplexity: float
    """The perplexity of the tokens under the target."""
    largest_probability_difference: float
    """The largest absolute difference of two probabilities of a next token."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How far source and target may be apart; a conversion past one of these keeps nothing."""

    slopes: float | None = None
    """The largest difference of two slopes, relative to the source's; None: the model has none, or none were asked."""
    logits: float | None = None
    """The largest absolute difference of two logits; None: probabilities are bounded, or nothing was compared."""
    probabilities: float | None = None
    """The largest absolute difference of two probabilities of a next token; None: logits are bounded, or nothing is."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What a conversion read and wrote, and how both compare."""

    version: int = CERTIFICATE_VERSION
    """The version of this description."""
    command: list[str] = field(default_factory=describe_command)
    """The words of the command line."""
    date: str = field(default_factory=describe_date)
    """When the conversion ended, in UTC."""
    versions: dict[str, str]
    """The versions of megalibi and of the packages that took part."""
    source: dict[str, Any]
    """What was read: a checkpoint's path, step, run and manifest checksum, or each foreign file with its SHA-256."""
    target: dict[str, Any]
    """What was written: its format and the type of its numbers."""
    tensors: list[TensorRecord]
    """Every tensor, in the order in which it was written."""
    ties: dict[str, str] = field(default_factory=dict)
    """Further names of tensors that have several, in the target, each with the name that is stored."""
    slopes: SlopeTables | None = None
    """The slopes of both sides; None: the model has none."""
    comparison: LogitComparison | None = None
    """How far source and target are apart; None: they were not compared."""
    not_compared: str | None = None
    """Why source and target were not compared; None: they were."""
    held_logit_difference: float | None = None
    """The largest difference of two logits where ours has the weights as they were rounded for the target, and a class
    that rounds its bias computes it in fp32: what ``bounds`` holds. None: the same as the comparison's."""
    texts_of_same_ids: int | None = None
    """The number of odd texts to which both tokenizers gave the same ids; None: no tokenizer came along, or it could
    not be run."""
    bounds: Bounds = field(default_factory=Bounds)
    """What was allowed, and holds."""
    notes: list[str] = field(default_factory=list)
    """What a user should know besides, a sentence each."""

    @property
    def all_equal(self) -> bool:
        """Whether every tensor came out with the bits that it should have."""
        return all(tensor.bit_equal for tensor in self.tensors)


def hash_tensor(values: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in its own type, little-endian and row-major."""
    return hashlib.sha256(as_bytes(values)).hexdigest()


def as_bytes(values: Tensor) -> memoryview:
    """Return a tensor's bytes in its own type, row-major; without a copy where it lies so on the host."""
    flat: np.ndarray = values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return flat.data


def describe_software(**others: str | None) -> dict[str, str]:
    """Return the versions of what takes part in a conversion.

    Args:
        others: Versions of further packages by name; None: it is not installed.
    """
    own = {"megalibi": megalibi.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return own | {name.replace("_", "-"): number or "not installed" for name, number in others.items()}


def compare_slopes(source: Tensor | None, target: Tensor | None) -> SlopeTables:
    """Return the slopes of both sides and their largest difference.

    Args:
        source: The source's slopes, [heads]; None: its software could not be asked.
        target: The target's, likewise.
    """
    source_list, target_list = (None if slopes is None else slopes.tolist() for slopes in (source, target))
    difference = None
    if source is not None and target is not None:
        difference = ((target.double() - source.double()).abs() / source.double().abs()).max().item()
    return SlopeTables(source=source_list, target=target_list, largest_difference=difference)


def check_tensor_finite(name: str, values: Tensor) -> None:
    """Check that a tensor's numbers are finite, before it goes on to where nobody looks at them.

    Raises:
        FileError: They are not.
    """
    if not values.isfinite().all():
        count = int((~values.isfinite()).sum())
        raise FileError(f"{name} has {count:,} numbers that are not finite: give a checkpoint from before that")


def write_certificate(certificate: Certificate, path: Path) -> None:
    """Write a certificate: ``certificate.json`` in a folder, or beside a file that is one alone.

    Raises:
        FileError: It cannot be written.
    """
    write_json(dataclasses.asdict(certificate), path)
