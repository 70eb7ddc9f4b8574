from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

import megalibi.data.text.documents as text_module
from megalibi.data.text.cutting import cut_anywhere, cut_at_spaces
from megalibi.data.text.documents import DocumentReader
from megalibi.errors import DataError

DOCUMENTS = ["first one\n\nof two  lines\n", "zweites\tmit ß und 日本", "third"]


def read_documents(*inputs: object, **kwargs) -> list[str]:
    documents, open_text = [], ""
    for piece in DocumentReader([str(name) for name in inputs], **kwargs):
        open_text += piece.text
        if piece.ends_document:
            documents.append(open_text)
            open_text = ""
    assert open_text == ""
    return documents


def write_json_lines(path: Path, documents=DOCUMENTS, key="text") -> Path:
    lines = "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(documents)).encode()
    path.write_bytes({".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(lines))
    return path


def write_parquet(path: Path, documents=DOCUMENTS, key="text") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(documents))), key: documents}), path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.jsonl.bz2", "a.jsonl.xz"])
def test_json(tmp_path, name):
    assert read_documents(write_json_lines(tmp_path / name)) == DOCUMENTS


def test_parquet(tmp_path):
    assert read_documents(write_parquet(tmp_path / "a.parquet")) == DOCUMENTS


def test_csv(tmp_path):
    (tmp_path / "a.csv").write_text('id,body\n1,"x, y"\n2,z\n')
    assert read_documents(tmp_path / "a.csv", text_key="body") == ["x, y", "z"]


def test_a_folder_that_datasets_loads(tmp_path):
    write_json_lines(tmp_path / "train.jsonl")
    assert read_documents(tmp_path) == DOCUMENTS


def test_formats_may_be_mixed_and_keep_their_order(tmp_path):
    (tmp_path / "b.txt").write_text("plain")
    inputs = [write_parquet(tmp_path / "z.parquet"), tmp_path / "b.txt", write_json_lines(tmp_path / "a.jsonl")]
    assert read_documents(*inputs) == [*DOCUMENTS, "plain", *DOCUMENTS]


@pytest.mark.parametrize(
    ("text_unit", "expected"),
    [
        ("document", ["one\r\ntwo \n\n \nthree\n"]),
        ("line", ["one", "two ", " ", "three"]),
        ("paragraph", ["one\r\ntwo ", "three"]),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_text_units(tmp_path, text_unit, expected, suffix):
    content = b"one\r\ntwo \n\n \nthree\n"
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(content) if suffix == ".txt.gz" else content)
    assert read_documents(tmp_path / f"a{suffix}", text_unit=text_unit) == expected


def test_a_lone_carriage_return_ends_no_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\rstill one\r\ntwo\r\r\n\rthree\x0b\x0c\xe2\x80\xa8")
    lines = ["one\rstill one", "two\r", "\rthree\x0b\x0c\u2028"]
    assert read_documents(tmp_path / "a.txt", text_unit="line") == lines


@pytest.mark.parametrize("text_unit", ["document", "line", "paragraph"])
@pytest.mark.parametrize("suffix", [".txt", ".tokens", ".txt.gz"])
def test_a_byte_order_mark_is_no_text(tmp_path, text_unit, suffix):
    """At the beginning; anywhere else it is a character."""
    content = b"\xef\xbb\xbfone \xef\xbb\xbf two"
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(content) if suffix == ".txt.gz" else content)
    assert read_documents(tmp_path / f"a{suffix}", text_unit=text_unit) == ["one \ufeff two"]


@given(st.lists(st.text("ab \r\t\u3042", max_size=5), max_size=8), st.booleans())
def test_lines_are_those_between_line_ends(lines, has_last_end):
    content = "\n".join(lines) + "\n" * has_last_end
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.txt")
        path.write_bytes(content.encode())
        expected = [line.removesuffix("\r") for line in content.removesuffix("\n").split("\n") if content]
        assert read_documents(path, text_unit="line", keep_empty=True) == expected
        assert read_documents(path, text_unit="line") == [line for line in expected if line]
        reader = DocumentReader([str(path)], text_unit="line")
        list(reader)
        assert reader.counts[0].documents + reader.counts[0].empty == len(expected)


def test_long_text_without_a_space_is_cut_where_the_reader_is_told_to(tmp_path):
    text = "\u3042" * 500_000 + "\n" + "\u3044" * 500_000
    (tmp_path / "a.txt").write_text(text)
    pieces = list(DocumentReader([str(tmp_path / "a.txt")], cut=cut_anywhere))
    assert "".join(piece.text for piece in pieces) == text
    assert max(len(piece.text) for piece in pieces) <= text_module.PIECE_CHARACTERS
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize(
    ("text", "max_characters", "expected"),
    [
        ("abc\ndef\nghi", 5, ["abc\n", "def\n", "ghi"]),
        ("abcdefgh", 3, ["abc", "def", "gh"]),
        ("ab cdefgh\nij", 4, ["ab", " cde", "fgh\n", "ij"]),
        ("      x", 3, ["   ", "   ", "x"]),
    ],
)
def test_cutting_anywhere(text, max_characters, expected):
    assert list(cut_anywhere(text, max_characters)) == expected


def test_empty_documents_are_left_out(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert read_documents(tmp_path / "empty.txt", write_parquet(tmp_path / "a.parquet", ["", "x", None])) == ["x"]


def test_long_documents_come_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 10)
    text = "some words  and " * 50 + "aVeryLongWord" * 5
    (tmp_path / "a.txt").write_text(text)
    for name in (tmp_path / "a.txt", write_json_lines(tmp_path / "a.jsonl", [text])):
        pieces = list(DocumentReader([str(name)]))
        assert "".join(piece.text for piece in pieces) == text
        assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert max(len(piece.text) for piece in pieces[:-1]) <= 10


@given(st.text(st.sampled_from("  ab\n"), max_size=60), st.integers(1, 12))
def test_cuts_are_before_a_space_that_follows_something_else(text, max_characters):
    pieces = list(cut_at_spaces(text, max_characters))
    assert "".join(pieces) == text
    assert all(pieces)
    for before, after in itertools.pairwise(pieces):
        assert before[-1] != " "
        assert after[0] == " "
    for piece in pieces:
        if len(piece) > max_characters:  # only where there is no place to cut
            places = [i for i in range(1, max_characters) if piece[i] == " " and piece[i - 1] != " "]
            assert places == []


def test_another_column(tmp_path):
    assert read_documents(write_parquet(tmp_path / "a.parquet", key="body"), text_key="body") == DOCUMENTS


@pytest.mark.parametrize("write", [write_parquet, write_json_lines])
def test_missing_column(tmp_path, write):
    path = write(tmp_path / ("a.parquet" if write is write_parquet else "a.jsonl"), key="body")
    with pytest.raises(DataError, match=r"a\.\w+: no column 'text'; choose one of id, body with --text-key"):
        read_documents(path)


def test_a_column_that_is_no_text(tmp_path):
    with pytest.raises(DataError, match="column 'id' holds int64, not text"):
        read_documents(write_parquet(tmp_path / "a.parquet"), text_key="id")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "no such file"),
        ("folder/none.txt", None, "no such file"),
        ("a.pdf", b"x", "its name ends in no known format; .txt, .tokens, .json, .jsonl"),
        ("a.txt", b"ab\xff\xfe", "not UTF-8 text"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.txt.xz", b"no xz", "cannot be read"),
        ("a.jsonl", b'{"text": "x"', "line 1: it is not JSON"),
        ("a.parquet", b"PAR1 no parquet", "cannot be read"),
        ("no good : name", None, "neither a file, nor a folder, nor a hub name"),
    ],
)
def test_bad_inputs(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_documents(name)
    assert str(error.value).startswith(name)
