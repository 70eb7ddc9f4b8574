from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalibi.data.preprocess import preprocess
from megalibi.data.text.documents import DocumentReader
from megalibi.data.text.sources import find_format, find_sources
from megalibi.errors import ConfigError, DataError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {".csv": f"text\n{text}\n", ".txt": text, ".md": text}.get(path.suffix, json.dumps({"text": text}) + "\n")
    path.write_text(content)
    return path


def read(*inputs: Path, **options) -> list[str]:
    return [piece.text for piece in DocumentReader(map(str, inputs), **options)]


ODD_NAMES = ["a[1].jsonl", "a*.jsonl", "a?.jsonl", "a b [x] *.jsonl", "[ab].txt", "{a,b}.jsonl", "~a.txt", "$HOME.txt"]


@pytest.mark.parametrize("name", [*ODD_NAMES, "%41.txt", "a'b\".jsonl", "-a.txt"])
def test_the_named_file_and_no_other_is_read(tmp_path, name):
    for other in ("a1.jsonl", "ab.jsonl", "a b x y.jsonl", "a.txt", "b.txt", "a.jsonl", "A.txt"):
        write(tmp_path / other, "another")
    assert read(write(tmp_path / name, "this")) == ["this"]


@pytest.mark.parametrize("name", ["a[1]", "a*", "[a]", "a b"])
def test_the_named_folder_and_no_other_is_read(tmp_path, name):
    for other in ("a1", "ab", "a"):
        write(tmp_path / other / "x.jsonl", "another")
    write(tmp_path / name / "[x].jsonl", "this")
    assert read(tmp_path / name) == ["this"]


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "a?.txt"])
def test_a_pattern_that_is_no_file_is_refused(tmp_path, name):
    write(tmp_path / "a1.jsonl", "another")
    with pytest.raises(DataError, match="no such file") as error:
        find_sources([str(tmp_path / name)])
    assert ("patterns are the shell's" in str(error.value)) == ("*" in name)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("", ConfigError, "--input='': must be the name of a file"),
        ("a" * 300 + ".jsonl", DataError, "a" * 100 + "...: cannot be read: File name too long"),
        ("a\0b.txt", DataError, "a\0b.txt: no such file"),
        ("none.jsonl.zst", DataError, "none.jsonl.zst: no such file"),
        ("a.parquet.gz", DataError, "a.parquet.gz: its name ends in no known format"),
        ("a.gz", DataError, "a.gz: its name ends in no known format"),
        ("pipe.txt", DataError, "pipe.txt: not a regular file"),
        ("no good : name", DataError, "no good : name: neither a file, nor a folder, nor a hub name"),
    ],
)
def test_names_of_nothing(tmp_path, monkeypatch, name, kind, message):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.txt")
    for existing in ("a.parquet.gz", "a.gz"):
        Path(existing).touch()
    with pytest.raises(kind) as error:
        find_sources([name])
    assert str(error.value).startswith(message)


def test_all_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    """Names that say train or test, formats side by side, folders within: nothing is chosen."""
    names = ["c.csv", "test_report.jsonl", "train_a.jsonl", "b.txt", "sub/valid.jsonl", "a.JSONL"]
    for name in names:
        write(tmp_path / name, name)
    assert read(tmp_path) == sorted(names)


def test_what_is_left_out_of_a_folder_is_said(tmp_path, caplog):
    for name in ("a.jsonl", "README.md", ".hidden.jsonl", ".git/x.jsonl"):
        write(tmp_path / name, name)
    with caplog.at_level("WARNING", "megalibi"):
        assert read(tmp_path) == ["a.jsonl"]
    assert f"{tmp_path}: left out, for their names or what they hold are not those of texts: README.md\n" in caplog.text
    for number in range(6):
        write(tmp_path / f"{number}.md", "")
    with caplog.at_level("WARNING", "megalibi"):
        assert read(tmp_path) == ["a.jsonl"]
    assert "of texts: 0.md, 1.md, 2.md, 3.md, 4.md and 2 more\n" in caplog.text
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match="no file in this folder is in a known format"):
        find_sources([str(tmp_path)])


def test_links_to_folders_are_followed_once(tmp_path):
    write(tmp_path / "elsewhere" / "x.jsonl", "x")
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", "a")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert read(tmp_path / "in") == ["a", "x"]


def test_a_file_is_read_once_by_however_many_names(tmp_path):
    write(tmp_path / "real" / "a.txt", "a")
    for link, target in (("alink", "real"), ("zlink", "real"), ("file.txt", "real/a.txt")):
        (tmp_path / link).symlink_to(tmp_path / target)
    assert read(tmp_path) == ["a"]


def test_what_describes_the_files_of_a_folder_is_no_text(tmp_path, tokenizer_path, caplog):
    """As PREFIX.json, which stands where its token file does."""
    write(tmp_path / "a.jsonl", "some text")
    (tmp_path / "dataset_info.json").write_text('{"features": {}}')
    arguments = {"tokenizer_path": str(tokenizer_path), "output": str(tmp_path / "tokens")}
    for overwrite in (False, True):
        assert preprocess([str(tmp_path)], **arguments, overwrite=overwrite).documents == 1
    assert (tmp_path / "tokens.json").exists()
    caplog.clear()
    with caplog.at_level("WARNING", "megalibi"):
        assert read(tmp_path) == ["some text"]
    assert "of texts: dataset_info.json, tokens.bin, tokens.idx, tokens.json\n" in caplog.text


@given(st.dictionaries(st.text("ab[*? .", min_size=1, max_size=6), st.text("ab \r\n\u3042", max_size=9), max_size=5))
def test_a_folder_gives_what_its_files_hold(files):
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            Path(folder, f"x{name}.txt").write_bytes(text.encode())
        expected = [path.read_bytes().decode() for path in sorted(Path(folder).iterdir())]
        if files:
            assert read(Path(folder)) == [text for text in expected if text]


@pytest.mark.parametrize(("unit", "expected"), [("document", ["a\nb\n", "c"]), ("line", ["a", "b", "c"])])
def test_the_text_unit_holds_in_folders(tmp_path, unit, expected):
    write(tmp_path / "1.txt", "a\nb\n")
    write(tmp_path / "2.txt", "c")
    assert read(tmp_path, text_unit=unit) == expected


def test_records_of_a_folder_may_have_other_fields_and_types(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "x": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "two", "x": "s"}\n')
    (tmp_path / "c.jsonl").write_text('{"y": [], "text": "three"}\n')
    assert read(tmp_path) == ["one", "two", "three"]


def test_folders_that_datasets_saved(tmp_path):
    saved = datasets.Dataset.from_dict({"id": [1, 2], "text": ["one", "two"]})
    saved.save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == ["one", "two"]
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "splits")
    assert read(tmp_path / "splits") == ["one", "two"]
    assert read(tmp_path / "splits" / "test") == ["one"]
    datasets.DatasetDict({"test": saved}).save_to_disk(tmp_path / "no_train")
    with pytest.raises(DataError, match="there is no split train; give the folder of one of test"):
        read(tmp_path / "no_train")
    with pytest.raises(DataError, match="column 'id' holds int64, not text"):
        read(tmp_path / "one", text_key="id")
    with pytest.raises(DataError, match="no column 'body'; choose one of id, text with --text-key"):
        read(tmp_path / "one", text_key="body")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(DataError, match="one: cannot be read: "):
        read(tmp_path / "one")


def test_names_of_the_hub(monkeypatch):
    (source,) = find_sources(["org/some.name:config@test[:10%]"])
    assert source.hub_name() == ("org/some.name", "config", "test[:10%]")
    (source,) = find_sources(["name"])
    assert source.hub_name() == ("name", None, "train")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wiki.train.tokens", ".tokens"),
        ("a.jsonl.zst", ".jsonl"),
        ("a.CSV.GZ", ".csv"),
        ("a.parquet", ".parquet"),
        ("a.feather", ".feather"),
        ("a.arrow.gz", None),
        ("jsonl", None),
        (".jsonl", None),
        ("a.jsonl.tmp", None),
    ],
)
def test_formats_by_name(name, expected):
    assert find_format(name) == expected
