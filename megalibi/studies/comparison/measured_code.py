"""Which code of megalibi measured a turn: turns of different code are not compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalibi.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Code:
    """The code of megalibi that measures a turn."""

    commit: str
    """The commit, without -dirty; results that a study writes may be tracked files, which make it so."""
    sha256: str
    """Checksum of the sources of our packages, as hash_code returns it; empty: a turn of an earlier form."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Code:
        """Return the code of what a turn wrote, which has ``commit`` and ``code``."""
        commit = str(record.get("commit", "unknown")).removesuffix("-dirty")
        return cls(commit=commit, sha256=str(record.get("code", "")))

    def is_same(self, other: Code) -> bool:
        """Return whether the sources are the same, or the commits where those of one are not known."""
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return self.commit == other.commit

    def __str__(self) -> str:
        """Return the code in words."""
        return f"code {self.sha256[:12]} of commit {self.commit}" if self.sha256 else f"commit {self.commit}"


def check_same_code(codes: Mapping[Path, Code], code: Code | None = None) -> None:
    """Refuse turns of different code: what changed could be taken for a difference of the models.

    Args:
        codes: File of a turn -> the code that it was measured with.
        code: The code of the turns that are to be measured, if there are any.

    Raises:
        ConfigError: Two differ. Nothing is measured anew by itself, for that would throw work away.
    """
    for output, other in codes.items():
        for wanted in dict.fromkeys(codes.values()) if code is None else (code,):
            if not other.is_same(wanted):
                there = "another turn" if code is None else "what is missing would be measured"
                raise ConfigError(
                    f"{output} was measured with {other}, {there} with {wanted}, and turns of different code cannot "
                    f"be compared: go back to {other}, give another train.output_dir, or delete "
                    f"{output.parent.parent} to measure all of them anew"
                )
