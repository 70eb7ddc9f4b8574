from __future__ import annotations

import dataclasses

from megalibi.studies.finding import Finding


def test_a_finding_is_one_line_that_begins_with_the_verdict() -> None:
    finding = Finding(expected="it is flat", rule="none", measured="1.00 to 1.01", holds=True)
    assert str(finding) == "as in the paper: it is flat: 1.00 to 1.01"
    assert str(dataclasses.replace(finding, holds=False)).startswith("NOT as in the paper: it is flat")
