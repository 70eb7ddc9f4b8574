"""What the steps of a visit are made of: the device, the folders, the text and the peers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalibi.data.provenance import read_provenance
from megalibi.data.tokens.token_file import TokenFile

RANDOM_TOKENS = 1 << 22
"""Random ids to train on where there is no text: enough for every step of a visit."""
VOCAB_SIZE, TOY_VOCAB_SIZE, VOCAB_SIZE_1_3B = 8192, 509, 50257
"""Vocabulary sizes of the random ids, of those for a toy, and of the 1.3B model."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the steps of a visit are made of."""

    device: str
    """The device: cuda, or cpu for a toy model."""
    seconds: float
    """Seconds that the whole visit may take."""
    folder: Path
    """The folder that gets the visit's results."""
    scratch: Path
    """The folder for runs and token files."""
    root: Path
    """The folder of the repository, whose tools/, configs/ and tests/ the steps use."""
    python: str
    """The Python interpreter to start."""
    data: str
    """Prefix of the token file to train on."""
    vocab_size: int = VOCAB_SIZE
    """Vocabulary size of its ids."""
    valid: str = ""
    """Prefix of the token file on which the extrapolation study evaluates; empty means that the study is left out."""
    peers: Sequence[str] = ()
    """Other implementations of attention to measure beside ours."""
    compiled_peers: Sequence[str] = ()
    """Other implementations that torch compiles first, which takes a while."""
    overrides: Sequence[str] = ()
    """``section.field=value`` strings for the 1.3B model."""

    @property
    def is_toy(self) -> bool:
        """Whether the model is a toy, to try the visit itself on a CPU."""
        return self.device == "cpu"

    def output(self, name: str) -> Path:
        """Return the file that a step writes."""
        return self.folder / f"{name}.json"


def find_vocab_size(prefixes: Sequence[str]) -> int:
    """Return the vocabulary's size of token files, the 1.3B model's if they do not say it.

    Raises:
        ConfigError: One is missing or damaged.
    """
    known = [read_provenance(TokenFile(prefix)) for prefix in prefixes]
    return max((said.tokenizer["vocab_size"] for said in known if said is not None), default=VOCAB_SIZE_1_3B)
