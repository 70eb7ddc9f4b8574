from __future__ import annotations

import os
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import megalibi.data.tokens.token_file as token_file_module
from megalibi.data.tokens.token_file import TokenFile, TokenFileWriter, check_token_ids
from megalibi.errors import DataError
from megalibi.files import FileInUseError, open_aside

CODES = {"B": 1, "b": 2, "h": 3, "i": 4, "q": 5, "d": 6, "f": 7, "H": 8}


def pack_token_file(documents: list[list[list[int]]], letter: str) -> tuple[bytes, bytes]:
    """The format once more, with struct alone: documents of sequences of tokens."""
    sequences = [sequence for document in documents for sequence in document]
    tokens = [token for sequence in sequences for token in sequence]
    pointers, boundaries = [], [0]
    for index in range(len(sequences)):
        pointers.append(sum(map(len, sequences[:index])) * struct.calcsize(letter))
    for document in documents:
        boundaries.append(boundaries[-1] + len(document))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[letter], len(sequences), len(boundaries))
    index = (
        header
        + struct.pack(f"<{len(sequences)}i", *map(len, sequences))
        + struct.pack(f"<{len(sequences)}q", *pointers)
        + struct.pack(f"<{len(boundaries)}q", *boundaries)
    )
    return struct.pack(f"<{len(tokens)}{letter}", *tokens), index


def write_packed(prefix: Path, documents: list[list[list[int]]], letter: str) -> TokenFile:
    binary, index = pack_token_file(documents, letter)
    Path(f"{prefix}.bin").write_bytes(binary)
    Path(f"{prefix}.idx").write_bytes(index)
    return TokenFile(prefix)


def test_golden_bytes(tmp_path):
    with TokenFileWriter(tmp_path / "a", vocab_size=1000) as writer:
        writer.add_document([1, 2, 999])
        writer.add_document([])
        writer.add_document([7])
    assert (tmp_path / "a.bin").read_bytes() == bytes.fromhex("0100 0200 e703 0700")
    assert (tmp_path / "a.idx").read_bytes() == bytes.fromhex(
        "4d4d494449445800 00"  # MMIDIDX
        "0100000000000000 08 0300000000000000 0400000000000000"  # version 1, uint16, 3 sequences, 4 document indices
        "03000000 00000000 01000000"  # lengths
        "0000000000000000 0600000000000000 0600000000000000"  # byte offsets
        "0000000000000000 0100000000000000 0200000000000000 0300000000000000"  # document indices
    )


@pytest.mark.parametrize(("vocab_size", "letter"), [(65_499, "H"), (65_500, "i"), (250_000, "i")])
def test_writer_writes_what_megatron_writes(tmp_path, vocab_size, letter):
    documents = [[[0, 1, vocab_size - 1]], [[5]], [[4, 4]]]
    with TokenFileWriter(tmp_path / "a", vocab_size) as writer:
        for (document,) in documents:
            writer.add_document(np.array(document))
    assert ((tmp_path / "a.bin").read_bytes(), (tmp_path / "a.idx").read_bytes()) == pack_token_file(documents, letter)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("letter", ["B", "b", "h", "H", "i", "q"])
def test_reader_reads_every_integer_type(tmp_path, letter):
    token_file = write_packed(tmp_path / "a", [[[1, 2, 3], [4]], [[5, 127]]], letter)
    assert token_file.num_tokens == 6
    assert token_file.num_documents == 2
    assert token_file.dtype == np.dtype(f"<{letter}")
    assert token_file.read(2, 3).tolist() == [3, 4, 5]


@given(st.lists(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=3), max_size=8), st.data())
def test_document_starts_are_those_of_a_scan(tmp_path_factory, documents, data):
    token_file = write_packed(tmp_path_factory.mktemp("starts") / "a", documents, "H")
    starts, position = [], 0
    for document in documents:
        starts.append(position)
        position += sum(map(len, document))
    assert token_file.num_tokens == position
    start = data.draw(st.integers(0, position))
    stop = data.draw(st.integers(start, position))
    # A document without a token at the very end of the stream begins at no token.
    expected = [at for at in starts if start <= at < stop]
    assert token_file.document_starts_between(start, stop).tolist() == expected


def test_long_documents_go_on_in_another_sequence(tmp_path, monkeypatch):
    monkeypatch.setattr(token_file_module, "_MAX_SEQUENCE_TOKENS", 3)
    with TokenFileWriter(tmp_path / "a", 100) as writer:
        writer.add_tokens([1, 2])
        writer.add_tokens([3, 4, 5, 6, 7])
        writer.end_document()
        writer.add_document([8])
    binary, index = pack_token_file([[[1, 2, 3], [4, 5, 6], [7]], [[8]]], "H")
    assert (tmp_path / "a.bin").read_bytes() == binary
    assert (tmp_path / "a.idx").read_bytes() == index


def test_nothing_is_left_when_writing_fails(tmp_path):
    with pytest.raises(OverflowError), TokenFileWriter(tmp_path / "a", 100) as writer:
        writer.add_document([1, 70_000])
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_the_old_files(tmp_path, write_tokens):
    prefix = write_tokens([[1, 2, 3]])
    with pytest.raises(OverflowError), TokenFileWriter(prefix, 100) as writer:
        writer.add_document([9, 70_000])
    assert TokenFile(prefix).read(0, 3).tolist() == [1, 2, 3]


def test_no_documents(write_tokens):
    token_file = TokenFile(write_tokens([]))
    assert (token_file.num_tokens, token_file.num_documents) == (0, 0)


def test_opening_does_not_depend_on_the_size(tmp_path):
    """A set of 10^12 tokens, as sparse files: sizes are real, blocks are not."""
    num_tokens, num_sequences = 10**12, 500
    lengths = [num_tokens // num_sequences] * num_sequences
    pointers = np.arange(num_sequences) * lengths[0] * 2
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, num_sequences, num_sequences + 1)
    index += struct.pack(f"<{num_sequences}i", *lengths) + pointers.astype("<i8").tobytes()
    index += np.arange(num_sequences + 1).astype("<i8").tobytes()
    (tmp_path / "a.idx").write_bytes(index)
    with open(tmp_path / "a.bin", "wb") as file:
        try:
            os.truncate(file.fileno(), num_tokens * 2)
        except OSError:
            pytest.fail("this file system has no sparse files of 2 TB; set --basetemp to one that has")
    tracemalloc.start()
    start = time.process_time()
    token_file = TokenFile(tmp_path / "a")
    token_file.read(num_tokens - 10, 10)
    seconds = time.process_time() - start
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert token_file.num_tokens == num_tokens
    assert seconds < 0.5
    assert memory < 100_000


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file(write_tokens, suffix):
    prefix = write_tokens([[1, 2, 3]])
    os.unlink(prefix + suffix)
    with pytest.raises(DataError, match=rf"set\{suffix}: no such token file; write it with"):
        TokenFile(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("kept", [0, 1, 7])
def test_truncated_file(write_tokens, suffix, kept):
    prefix = write_tokens([list(range(5))] * 4)
    os.truncate(prefix + suffix, kept)
    with pytest.raises(DataError, match=rf"set\{suffix}: truncated, {kept} bytes"):
        TokenFile(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_every_shorter_and_longer_file_is_refused(write_tokens, suffix):
    prefix = write_tokens([list(range(5))] * 4)
    size = os.path.getsize(prefix + suffix)
    for kept in [*range(size), size + 1]:
        os.truncate(prefix + suffix, kept)
        with pytest.raises(DataError, match=rf"set\{suffix}: "):
            TokenFile(prefix)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"PK", "not a Megatron-LM index"),
        (9, b"\x02", "index version 2; only version 1"),
        (17, b"\x06", "token type is float64; tokens must be integers"),
        (17, b"\x63", "token type is unknown code 99"),
        (-8, b"\x09", "document indices do not span its 4 sequences"),
    ],
)
def test_foreign_index(write_tokens, offset, value, message):
    prefix = write_tokens([[1, 2]] * 4)
    index = bytearray(Path(prefix + ".idx").read_bytes())
    start = offset % len(index)
    index[start : start + len(value)] = value
    Path(prefix + ".idx").write_bytes(index)
    with pytest.raises(DataError, match=message) as error:
        TokenFile(prefix)
    assert "\n" not in str(error.value)
    assert "set.idx" in str(error.value)


def test_ids_past_the_vocabulary_are_found_at_opening(write_tokens):
    prefix = write_tokens([[5] * 1000, [5, 5, 77, 5]])
    check_token_ids(TokenFile(prefix), 78)
    with pytest.raises(DataError, match=r"set\.bin: token 1002 is id 77, past vocab_size=77; the file was made with"):
        check_token_ids(TokenFile(prefix), 77)


def test_probing_reads_a_bounded_part(write_tokens):
    token_file = TokenFile(write_tokens([[5] * 100_000]))
    reads: list[tuple[int, int]] = []
    read = token_file.read
    token_file.read = lambda start, count: reads.append((start, count)) or read(start, count)  # type: ignore
    check_token_ids(token_file, 6, num_probes=8, probe_tokens=16)
    assert len(reads) == 8
    assert reads[0] == (0, 16)
    assert reads[-1] == (100_000 - 16, 16)


def test_a_second_writer_is_refused_and_the_first_one_is_whole(tmp_path):
    with TokenFileWriter(tmp_path / "a", 100) as first:
        first.add_document([1, 2, 3])
        with pytest.raises(FileInUseError, match=r"another process is writing .*/a\.bin"):
            TokenFileWriter(tmp_path / "a", 100)
        first.add_document([4])
    assert TokenFile(tmp_path / "a").read(0, 4).tolist() == [1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_an_index_aside_that_is_in_use_leaves_no_tokens_aside(tmp_path):
    with open_aside(tmp_path / "a.idx"), pytest.raises(FileInUseError, match=r"another process is writing .*/a\.idx"):
        TokenFileWriter(tmp_path / "a", 100)
    assert [path.name for path in tmp_path.iterdir()] == ["a.idx"]
