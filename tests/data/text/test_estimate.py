from __future__ import annotations

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from megalibi.data.text.estimate import estimate_text_bytes
from megalibi.errors import DataError

# What tells the time left may be off by a half, not by a multiple.
TOLERANCE = 0.5


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_estimates_are_about_right(tmp_path, english, name):
    path = tmp_path / name
    if name.startswith("a.txt"):
        content = "\n".join(english).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    elif name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": english, "other": english}), path)
    else:
        content = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(english)).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    actual = sum(len(text.encode()) for text in english)
    estimate = estimate_text_bytes([str(path)])
    assert estimate == pytest.approx(actual, rel=TOLERANCE)
    assert estimate_text_bytes([str(path)] * 2) == 2 * estimate


def test_hub_names_cannot_be_estimated(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert estimate_text_bytes([str(tmp_path / "a.txt"), "org/name"]) is None


def test_unreadable_files_are_left_to_the_reader(tmp_path):
    (tmp_path / "a.jsonl").write_text("no json\n")
    (tmp_path / "b.parquet").write_text("no parquet")
    (tmp_path / "c.txt").write_text("text")
    assert estimate_text_bytes([str(path) for path in sorted(tmp_path.iterdir())]) == 4


def test_missing_files_are_found_at_once(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        estimate_text_bytes([str(tmp_path / "a.jsonl")])
