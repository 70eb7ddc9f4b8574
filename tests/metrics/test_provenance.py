from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from megalibi.metrics.provenance import describe_run, write_json


def test_a_record_says_what_its_figures_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/some.py", "--name", "a b"])
    record = describe_run("cpu", ("torch", "no-such-package"))
    assert record["command"] == "python tools/some.py --name 'a b'"
    assert record["versions"].keys() == {"megalibi", "python", "torch"}
    assert record["hardware"]["cores"] >= 1
    assert "gpu" not in record["hardware"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["date"])
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", record["commit"])


def test_a_file_is_replaced_whole_and_numbers_stand_on_one_line(tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    output.write_text("old")
    fields = {"losses": [1.5, -2e-7, 3], "names": ["[1,  2]", "b"], "rows": [{"x": [1, 2]}], "none": []}
    write_json(fields, output)
    assert json.loads(output.read_text()) == fields
    assert "[ 1.5, -2e-07, 3 ]" in output.read_text()
    assert list(tmp_path.iterdir()) == [output]
