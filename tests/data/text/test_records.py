"""Records of every format, against what Python's own readers read; and records that are damaged."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megalibi.data.text.documents import DocumentReader
from megalibi.data.text.records import BadRecord, read_records
from megalibi.data.text.records.json_text import _JsonStream
from megalibi.data.text.sources import Source, find_format
from megalibi.errors import DataError

EXAMPLES = 60


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}

texts = st.text(
    st.one_of(
        st.sampled_from(" ,\"\n\r\t\\'{}[]:7NA\u00e9\u65e5\U0001d11e\u2028\x85\ufeff\x00"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=20,
)
# What may stand in other fields, and would decide a column's type if one looked at it.
others = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, st.just("2024-05-01")),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(texts, inner, max_size=2)),
    max_leaves=4,
)
records = st.lists(
    st.fixed_dictionaries(
        {}, optional={"text": st.one_of(st.none(), texts, others), "id": others, "meta": others, "url": others}
    ),
    max_size=6,
)


def write(path: Path, content: bytes) -> Path:
    compression = path.suffix if path.suffix in COMPRESS else ""
    path.write_bytes(COMPRESS[compression](content))
    return path


def read(path: Path) -> list[Any]:
    file_format = find_format(path.name)
    assert file_format is not None
    return list(read_records(Source(str(path), file_format), "text"))


def expected_of(values: list[Any]) -> list[Any]:
    """Return what is to be read of JSON records; a BadRecord where the text is none."""
    expected: list[Any] = []
    for value in values:
        text = value.get("text") if isinstance(value, dict) else value
        is_text = isinstance(value, dict) and (text is None or isinstance(text, str))
        expected.append(text if is_text else BadRecord)
    return expected


def assert_read(path: Path, values: list[Any]) -> None:
    """Assert what is read of a file of JSON records: all texts, or an error if no record has such a field."""
    expected = expected_of(values)
    fields = [value for value in values if isinstance(value, dict)]
    if any(fields) and not any("text" in value for value in fields):
        with pytest.raises(DataError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}: no column 'text'; choose one of ")
    else:
        assert [BadRecord if isinstance(record, BadRecord) else record for record in read(path)] == expected


@pytest.mark.parametrize("compression", COMPRESS)
@given(values=records, blank=st.sampled_from(["", "\n", " \r\n"]), mark=st.booleans(), ascii_only=st.booleans())
@settings(max_examples=EXAMPLES)
def test_json_lines(compression, values, blank, mark, ascii_only):
    lines = [json.dumps(value, ensure_ascii=ascii_only) + "\n" + blank for value in values]
    content = (b"\xef\xbb\xbf" if mark else b"") + "".join(lines).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "a.jsonl" + compression), content)
        assert_read(path, [json.loads(line) for line in lines])


@pytest.mark.parametrize("compression", ["", ".gz"])
@given(values=records, indent=st.sampled_from([None, 1]), mark=st.booleans(), is_list=st.booleans())
@example(values=[{"text": "x"}], indent=None, mark=True, is_list=True)
@settings(max_examples=EXAMPLES)
def test_json(compression, values, indent, mark, is_list):
    """A list of records, records over several lines, or a record a line."""
    if is_list:
        content = json.dumps(values, indent=indent)
    else:
        content = "".join(json.dumps(value, indent=indent) + "\n" for value in values)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "a.json" + compression), (b"\xef\xbb\xbf" if mark else b"") + content.encode())
        assert_read(path, values)


@given(values=records, block=st.integers(1, 30), indent=st.sampled_from([None, 1]))
def test_json_that_is_longer_than_what_is_read_at_once(values, block, indent):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_JsonStream, "_BLOCK_CHARACTERS", block)
        path = write(Path(folder, "a.json"), json.dumps(values, indent=indent).encode())
        assert_read(path, values)


@pytest.mark.parametrize("compression", ["", ".xz"])
@given(
    rows=st.lists(st.tuples(texts, texts), max_size=6),
    line_end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    mark=st.booleans(),
)
@settings(max_examples=EXAMPLES)
def test_csv(compression, rows, line_end, quoting, mark):
    """Python's writer quotes no lone \\r, so that what it writes is sometimes a row that is too short."""
    target = io.StringIO()
    writer = csv.writer(target, lineterminator=line_end, quoting=quoting)
    writer.writerow(["id", "text"])
    writer.writerows(rows)
    content = (b"\xef\xbb\xbf" if mark else b"") + target.getvalue().encode()
    found = list(csv.DictReader(io.StringIO(target.getvalue(), newline="")))
    expected = [BadRecord if None in row or None in row.values() else row["text"] for row in found]
    assert quoting == csv.QUOTE_MINIMAL or expected == [text for _, text in rows]
    with tempfile.TemporaryDirectory() as folder:
        actual = read(write(Path(folder, "a.csv" + compression), content))
    assert [BadRecord if isinstance(record, BadRecord) else record for record in actual] == expected


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather", ".stream.arrow"])
@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
@given(values=st.lists(st.one_of(st.none(), texts), max_size=150))
@settings(max_examples=10)
def test_tables(suffix, kind, values):
    table = pyarrow.table({"id": list(range(len(values))), "text": pyarrow.array(values, pyarrow.string()).cast(kind)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a" + suffix)
        if suffix == ".parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=70)
        elif suffix == ".feather":
            pyarrow.feather.write_feather(table, path)
        else:
            opened = pyarrow.ipc.new_stream if suffix == ".stream.arrow" else pyarrow.ipc.new_file
            with opened(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=70)
        assert read(path) == values


JSON_LINES = b'{"text": "one"}\n\n{"text": %s}\n{"text": "three"}\n'


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"7", "text is a number, not text"),
        (b"7.5", "text is a number, not text"),
        (b"NaN", "text is a number, not text"),
        (b"9" * 5_001, "text is a number, not text"),
        (b"true", "text is a boolean, not text"),
        (b'["x"]', "text is a list, not text"),
        (b'{"x": 1}', "text is an object, not text"),
        (b'"\xff"', "it is not UTF-8 text (invalid start byte at byte 11 of the line)"),
        (b'"\\ud800"', "it holds '\\ud800', half of a surrogate pair, which is no character"),
        (b'"x', "it is not JSON: Invalid control character (column 13)"),
        (b"", "it is not JSON: Expecting value (column 10)"),
        (b"[" * 100_000 + b"]" * 100_000, "its lists and objects are nested too deeply"),
    ],
)
def test_a_bad_line_is_named_or_skipped(tmp_path, value, reason):
    """The blank line before it counts as a line."""
    path = write(tmp_path / "a.jsonl", JSON_LINES.replace(b"%s", value))
    with pytest.raises(DataError) as error:
        list(DocumentReader([str(path)]))
    assert (
        str(error.value) == f"{path}, line 3: {reason}; correct it, or leave such records out with --skip-bad-records"
    )
    reader = DocumentReader([str(path)], skip_bad_records=True)
    assert [piece.text for piece in reader] == ["one", "three"]
    assert reader.counts[0].bad_records == [f"line 3: {reason}"]
    assert (reader.counts[0].num_bad_records, reader.counts[0].documents) == (1, 2)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"7", "it is a number, not an object with the field 'text'"),
        (b'["x"]', "it is a list, not an object with the field 'text'"),
        (b'"x"', "it is a text, not an object with the field 'text'"),
        (b"null", "it is null, not an object with the field 'text'"),
        (b'{"text": "x"} {"text": "y"}', "it is not JSON: Extra data (column 15)"),
    ],
)
def test_a_line_that_is_no_record(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n' + line + b"\n")
    assert read(path) == ["one", BadRecord("line 2", reason)]


@pytest.mark.parametrize("value", [b"7", b"true", b"{}"])
def test_one_record_that_is_no_text_changes_no_other(tmp_path, value):
    """Text with a line end and an escape in it stays what it is, whatever stands beside it, before it or far behind."""
    text = 'Line one.\nSaid "hi", caf\u00e9.'
    good = json.dumps({"text": text}).encode() + b"\n"
    bad = b'{"text": ' + value + b"}\n"
    for number, content in enumerate((bad + good, good + bad, good * 200_000 + bad)):
        found = read(write(tmp_path / f"{number}.jsonl", content))
        assert [record for record in found if not isinstance(record, BadRecord)] == [text] * content.count(good)
        assert sum(isinstance(record, BadRecord) for record in found) == 1


def test_fields_may_change_their_types_past_any_block(tmp_path):
    """What the first ten megabytes hold says nothing: of the text field, and of others."""
    first = [{"url": None, "meta": {}, "id": 1, "list": [], "date": "2024-05-01"}] * 150_000
    later = [{"url": "x", "meta": {"a": 1}, "id": "a", "list": [1], "date": "unknown", "text": "here", "new": 1}]
    content = "".join(json.dumps(record) + "\n" for record in first + later).encode()
    assert len(content) > 10_000_000
    reader = DocumentReader([str(write(tmp_path / "a.jsonl", content))])
    assert [piece.text for piece in reader] == ["here"]
    assert reader.counts[0].empty == 150_000


def test_a_bad_row_of_csv(tmp_path):
    path = write(tmp_path / "a.csv", b'id,text\n1,one\n2,a "b", c\n3\n4,"four\nlines"\n5,five,\n')
    assert read(path) == [
        "one",
        BadRecord("line 3", "it has 3 fields, and the header has 2"),
        BadRecord("line 4", "it has 1 fields, and the header has 2"),
        "four\nlines",
        BadRecord("line 7", "it has 3 fields, and the header has 2"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b'text\n"one\ntwo\n', ", line 3: it is not CSV: unexpected end of data"),
        ("a.csv", b"text\none\n\xff\n", ", line 3, byte 9 of the file: it is not UTF-8 text (invalid start byte)"),
        ("a.csv", b"text,text\na,b\n", ": 2 columns are called 'text'"),
        ("a.csv", b"id,body\na,b\n", ": no column 'text'; choose one of id, body with --text-key"),
        ("a.json", b'[{"text": "x"}, {"text": "y"', ", record 2: it is not JSON: Expecting ',' delimiter"),
        ("a.json", b'[{"text": "x"} {"text": "y"}]', ", record 2: it is not JSON: a comma is missing"),
        ("a.json", b'[{"text": "x"}', ", record 2: it is not JSON: the list ends without ]"),
        ("a.json", b'[{"text": "x"}] x', ", record 2: it is not JSON: something follows the list"),
        ("a.json", b'\xff\xfe[\0{\0}\0]\0', ", line 1, byte 0 of the file: it is not UTF-8 text (invalid "),
        ("a.json", b"[" * 100_000, ", record 1: its lists and objects are nested too deeply"),
        ("a.jsonl", b'{"id": 1}\n{"body": 2}\n', ": no column 'text'; choose one of id, body with --text-key"),
        ("a.txt", b"x" * 700_000 + b"\n" + b"\xe6\x97" * 300_000, ", line 2, byte 700001 of the file: it is not UTF-8"),
        ("a.txt", b"good\nbad \xe6\x97", ", line 2, byte 9 of the file: it is not UTF-8 text (unexpected end of data)"),
        ("a.parquet", b"PAR1", ": cannot be read: "),
        ("a.arrow", b"ARROW1\0\0", ": cannot be read: "),
        ("a.feather", b"", ": cannot be read: "),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        list(DocumentReader([str(path)], skip_bad_records=True))
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("compression", [suffix for suffix in COMPRESS if suffix])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_truncated_and_damaged_files(tmp_path, name, compression):
    texts = [f"{number} \u00fc\u65e5" for number in range(100_000, 400_000, 7)]  # damage cuts such letters in parts
    lines = "".join(f"{text}\n" for text in ["text", *texts]).encode()
    if name.startswith("a.json"):
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    whole = write(tmp_path / (name + compression), lines).read_bytes()
    path = tmp_path / ("b" + name + compression)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x10
    damaged = [bytes(flipped), whole[: len(whole) // 2], whole[:-5], b"nothing of the kind"]
    for content in damaged[compression == ".zst" :]:  # pyarrow writes no checksum into it
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            list(DocumentReader([str(path)], text_unit="line", skip_bad_records=True))
        assert str(error.value).startswith(f"{path}" if content == flipped else f"{path}: cannot be read")


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz"])
def test_flips_in_compressed_text_name_the_file(tmp_path, compression):
    """Whatever the bytes before the damage is found: one error, of the file that is read."""
    text = "".join(f"{number} \u00fc\u65e5\u672c\n" for number in range(2_000))
    whole = COMPRESS[compression](text.encode())
    path = tmp_path / f"a.txt{compression}"
    for place in range(20, len(whole) - 20, len(whole) // 60):
        flipped = bytearray(whole)
        flipped[place] ^= 0x08
        path.write_bytes(flipped)
        with pytest.raises(DataError) as error:
            list(DocumentReader([str(path)]))
        assert str(error.value).startswith(f"{path}: cannot be read"), place


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_every_member_of_a_compressed_file_is_read_or_refused(tmp_path, name, compression):
    parts = [b'{"text": "one"}\n', b'{"text": "two"}\n' * 20_000, b'{"text": "three"}\n']
    members = [COMPRESS[compression](part) for part in parts]
    path = tmp_path / (name + compression)
    path.write_bytes(b"".join(members))
    whole = b"".join(parts).decode()
    texts = [piece.text for piece in DocumentReader([str(path)])]
    assert texts == ["one", *["two"] * 20_000, "three"] if name == "a.jsonl" else "".join(texts) == whole
    for damaged in (
        members[0] + b"\1" + members[1],
        b"".join(members) + b"garbage",
        b"".join(members[:2]) + members[2][:8],
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read"):
            list(DocumentReader([str(path)]))


def test_an_xz_file_may_be_padded(tmp_path):
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(b"one ") + bytes(8) + lzma.compress(b"two") + bytes(4))
    assert [piece.text for piece in DocumentReader([str(path)])] == ["one two"]


FLIPS = """
import sys
from pathlib import Path
from megalibi.errors import DataError
from megalibi.data.text.records import read_records
from megalibi.data.text.saved_datasets import read_dataset
from megalibi.data.text.sources import Source
path, is_saved = Path(sys.argv[1]), len(sys.argv) > 2
source = Source(str(path.parent), "") if is_saved else Source(str(path), path.suffix)
read = read_dataset if is_saved else read_records
expected = [f"text {number}" for number in range(500)]
whole = bytearray(path.read_bytes())
for place in range(0, len(whole), max(1, len(whole) // (100 if is_saved else 300))):
    whole[place] ^= 0x40
    path.unlink()  # what is mapped stays as it was
    path.write_bytes(whole)
    whole[place] ^= 0x40
    try:
        texts = list(read(source, "text"))
        assert len(texts) == len(expected), place
        # The bytes of a text have no checksum in this format; which rows have one, and where it begins, must hold.
        differ = sum(text != other for text, other in zip(texts, expected))
        assert differ <= 2, (place, differ)
    except DataError as error:
        assert str(error).startswith(source.name), error
print("held")
"""
TEXTS_500 = {"text": [f"text {number}" for number in range(500)], "id": list(range(500))}


def read_flipped(path: Path, *more: str) -> None:
    done = subprocess.run([sys.executable, "-c", FLIPS, str(path), *more], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "held\n"), done.stderr[-2000:]


@pytest.mark.parametrize("opened", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_a_flipped_arrow_file_ends_no_process(tmp_path, opened):
    table = pyarrow.table(TEXTS_500)
    with opened(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    read_flipped(tmp_path / "a.arrow")


def test_a_flipped_file_that_datasets_saved_ends_no_process(tmp_path):
    datasets.Dataset.from_dict(TEXTS_500).save_to_disk(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.arrow")
    read_flipped(path, "saved")


def test_a_field_may_be_long(tmp_path):
    assert read(write(tmp_path / "a.csv", b"text\n" + b"x" * 300_000 + b"\n")) == ["x" * 300_000]


def test_the_place_of_a_bad_byte_across_what_is_read_at_once(tmp_path):
    content = b"x" * ((1 << 20) - 1) + "\u65e5".encode()[:1]
    with pytest.raises(DataError, match=rf"line 1, byte {(1 << 20) - 1} of the file"):
        list(DocumentReader([str(write(tmp_path / "a.txt", content + b"yy"))]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("is_bare", [True, False])
def test_a_file_without_bytes_holds_nothing(tmp_path, name, compression, is_bare):
    path = tmp_path / (name + compression)
    path.write_bytes(b"" if is_bare else COMPRESS[compression](b""))
    assert list(DocumentReader([str(path)])) == []


def test_a_table_without_rows_holds_nothing(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    assert list(DocumentReader([str(tmp_path / "a.parquet")])) == []


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pyarrow.array([1, 2]), "column 'text' holds int64, not text"),
        (pyarrow.array([b"a"]), "column 'text' holds binary, not text"),
        (pyarrow.array([["a"]]), "column 'text' holds list<"),
        (pyarrow.array([{"a": "b"}]), "column 'text' holds struct<"),
    ],
)
def test_a_column_of_another_type(tmp_path, column, message):
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.parquet")


def test_two_columns_of_one_name(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="2 columns are called 'text'"):
        read(tmp_path / "a.parquet")


def test_text_of_a_table_that_is_not_utf8(tmp_path):
    column = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    bad = BadRecord("row 2", "it is not UTF-8 text (invalid start byte at byte 1)")
    assert read(tmp_path / "a.parquet") == ["a", bad, "c"]
