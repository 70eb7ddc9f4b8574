from __future__ import annotations

import dataclasses

import pytest

from megalibi.studies.finding import Finding, format_findings


def test_a_finding_is_one_line_that_begins_with_the_verdict() -> None:
    finding = Finding(expected="it is flat", rule="none", measured="1.00 to 1.01", holds=True)
    assert str(finding) == "as in the paper: it is flat: 1.00 to 1.01"
    assert str(dataclasses.replace(finding, holds=False)).startswith("NOT as in the paper: it is flat")
    open_finding = dataclasses.replace(finding, holds=None, reason="1 of 2 seeds says yes")
    assert str(open_finding) == "not decided (1 of 2 seeds says yes): it is flat: 1.00 to 1.01"


def test_a_page_has_one_of_three_verdicts() -> None:
    finding = Finding(expected="it is flat", rule="none", measured="1.00", holds=True)
    findings = [finding, *(dataclasses.replace(finding, holds=h, reason=r) for h, r in ((False, ""), (None, "why")))]
    cells = [line.split("|")[1].strip() for line in format_findings(findings)][2:]
    assert cells == ["yes", "**no**", "not decided: why"]


@pytest.mark.parametrize(("holds", "reason"), [(True, "why"), (False, "why"), (None, "")])
def test_what_is_not_decided_has_a_reason_and_nothing_else_has(holds: bool | None, reason: str) -> None:
    with pytest.raises(AssertionError):
        Finding(expected="it is flat", rule="none", measured="1.00", holds=holds, reason=reason)
