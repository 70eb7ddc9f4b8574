"""A finding: one statement of the paper, the rule that decides whether it holds here, and the numbers it was judged by.

Every study judges its own results and returns findings; this module says what a finding is and how a page shows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megalibi.report.markdown import format_table

FLAT = 0.03
"""A curve is flat if it stays within this share of its value at the training length. The paper calls ALiBi flat under
sliding evaluation, where its Table 15 rises by 1.8% (trained at 512) and by 2.6% (trained at 1,024)."""
EXPLODED = 2.0
"""A curve has exploded if it ends at this many times its value at the training length or more. In the paper's Table 2
sinusoidal positions get there at twice the training length."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One statement of the paper, and whether it holds here."""

    expected: str
    """What the paper found, in words."""
    rule: str
    """The condition on our numbers under which the statement holds here."""
    measured: str
    """The numbers that the rule was applied to."""
    holds: bool | None
    """Whether they meet the rule; None where that is not decided."""
    reason: str = ""
    """Why it is not decided, in words; empty where it is decided."""

    def __post_init__(self) -> None:
        """Check that exactly what is not decided has a reason."""
        assert bool(self.reason) == (self.holds is None), self

    def __str__(self) -> str:
        """Return the line that a command prints."""
        verdicts = {True: "as in the paper", False: "NOT as in the paper", None: f"not decided ({self.reason})"}
        return f"{verdicts[self.holds]}: {self.expected}: {self.measured}"


def format_findings(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield the lines of the Markdown table of a study's findings."""
    verdicts: dict[bool | None, str] = {True: "yes", False: "**no**"}
    rows = ([verdicts.get(f.holds, f"not decided: {f.reason}"), f.expected, f.measured, f.rule] for f in findings)
    return format_table(["", "the paper found", "here", "rule"], rows, left=4)
