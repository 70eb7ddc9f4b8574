from __future__ import annotations

import itertools
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import megalibi.data.tokens.token_index as token_index
from megalibi.data.tokens.token_file import TokenFile, TokenFileWriter
from megalibi.errors import DataError
from tests.data.tokens.test_token_file import pack_token_file, write_packed

Documents = list[list[list[int]]]
# Enough of them that a lone odd document is damage; with empty ones at both ends and in the middle.
ONE_SEQUENCE_EACH: Documents = [[list(range(n % 4))] for n in range(17)]
NONE_OR_ONE: Documents = [[[1, 2, 3]] if n % 5 else [] for n in range(18)]


def written_by_us(folder: Path) -> Path:
    with TokenFileWriter(folder / "a", 70_000) as writer:
        for (document,) in ONE_SEQUENCE_EACH:
            writer.add_document(document)
    return folder / "a"


def look(token_file: TokenFile) -> tuple[list[int], set[int]]:
    """All tokens, and where documents begin: empty documents begin where the next one does."""
    tokens = token_file.read(0, token_file.num_tokens).tolist()
    return tokens, set(token_file.document_starts_between(0, token_file.num_tokens).tolist())


def assert_flips_show(prefix: Path) -> int:
    """Flip every bit of the index; return how many flips were refused."""
    path = Path(f"{prefix}.idx")
    whole, seen, said = path.read_bytes(), look(TokenFile(prefix)), []
    with path.open("r+b", buffering=0) as file:
        for place, bit in itertools.product(range(len(whole)), range(8)):
            os.pwrite(file.fileno(), bytes([whole[place] ^ 1 << bit]), place)
            try:
                assert look(TokenFile(prefix)) == seen, f"bit {bit} of byte {place} of {len(whole)}"
            except DataError as error:
                said.append(str(error))
            os.pwrite(file.fileno(), whole[place : place + 1], place)
    assert all("a.idx" in message and "\n" not in message for message in said)
    return len(said)


def test_every_flipped_bit_of_an_index_that_we_write_is_refused(tmp_path: Path) -> None:
    prefix = written_by_us(tmp_path)
    assert assert_flips_show(prefix) == 8 * Path(f"{prefix}.idx").stat().st_size


@pytest.mark.parametrize("letter", ["B", "H", "q"])
def test_flipped_bits_are_refused_or_change_nothing_where_documents_have_at_most_one_sequence(
    tmp_path: Path, letter: str
) -> None:
    """Harmless are those that swap an empty document with its neighbour: documents begin where they began."""
    write_packed(tmp_path / "a", NONE_OR_ONE, letter)
    num_bits = 8 * (tmp_path / "a.idx").stat().st_size
    assert num_bits - 10 <= assert_flips_show(tmp_path / "a") < num_bits


@given(st.lists(st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=4), max_size=30))
def test_every_legal_index_is_accepted(tmp_path_factory: pytest.TempPathFactory, documents: Documents) -> None:
    """Documents without sequences, sequences without tokens, and documents of several sequences."""
    lone_pair = [len(document) for document in documents if len(document) > 1] == [2]
    if lone_pair and len(documents) >= 16:
        documents.append([[1], [2]])
    token_file = write_packed(tmp_path_factory.mktemp("legal") / "a", documents, "H")
    lengths = [sum(map(len, document)) for document in documents]
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    assert token_file.num_documents == len(documents)
    assert look(token_file)[1] == {start for start in starts if start < token_file.num_tokens}


@pytest.mark.parametrize("few", [[[[1]], [], [[2], [3]]], [[], [[1], [2]]], [[[1], [2]], []], [[[1], [2]]]])
def test_among_few_documents_none_is_odd(tmp_path: Path, few: Documents) -> None:
    assert write_packed(tmp_path / "a", few, "H").num_documents == len(few)


def write_index(
    folder: Path, lengths: list[int], pointers: list[int], boundaries: list[int], bin_bytes: int
) -> TokenFile:
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(lengths), len(boundaries))
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(pointers)}q", *pointers)
    (folder / "a.idx").write_bytes(index + struct.pack(f"<{len(boundaries)}q", *boundaries))
    (folder / "a.bin").write_bytes(bytes(bin_bytes))
    return TokenFile(folder / "a")


@pytest.mark.parametrize(
    ("lengths", "pointers", "boundaries", "message"),
    [
        ([2, -1, 3], [0, 4, 2], [0, 1, 2, 3], "sequence 1 has length -1"),
        ([2, 1, 1], [0, 4, 8], [0, 1, 2, 3], "sequence 2 begins at byte 8, but those before it end at 6"),
        ([2, 1, 1], [2, 4, 6], [0, 1, 2, 3], "sequence 0 begins at byte 2, but those before it end at 0"),
        ([2, 1, 1], [0, 4, 6], [0, 2, 1, 3], "document index 2 is 1, after 2: they must rise"),
        ([2, 1, 1], [0, 4, 6], [0, 10**12, 2, 3], "document index 2 is 2, after 1000000000000: they must rise"),
        ([2, 1, 1], [0, 4, 6], [0, -1, 2, 3], "document index 1 is -1, after 0: they must rise"),
        ([2, 1, 1], [0, 4, 6], [0, 1, 2], "the document indices do not span its 3 sequences"),
        ([2, 1, 1], [0, 4, 6], [1, 2, 3], "the first document index is 1, not 0"),
        ([2, 1, 1], [0, 4, 6], [], "the document indices do not span its 3 sequences"),
        ([], [], [], "the document indices do not span its 0 sequences"),
        ([1] * 16, list(range(0, 32, 2)), [0, 1, 2, 3, 3, *range(5, 17)],
         "document 4 alone has two sequences, beside one that has none: its document index is off"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("block", [1, 2, 1000])
def test_each_broken_rule_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    lengths: list[int],
    pointers: list[int],
    boundaries: list[int],
    message: str,
) -> None:
    monkeypatch.setattr(token_index, "_BLOCK_ENTRIES", block)
    with pytest.raises(DataError) as error:
        write_index(tmp_path, lengths, pointers, boundaries, 2 * sum(lengths))
    advice = "the index is damaged: copy it or write it again"
    assert str(error.value) == f"{tmp_path}/a.idx: {message}; {advice}"


def test_lengths_that_do_not_add_up_to_the_tokens_name_both_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.bin: truncated, 6 bytes of the 8 that .*a\.idx promises"):
        write_index(tmp_path, [2, 2], [0, 4], [0, 2], 6)
    with pytest.raises(DataError, match=r"a\.bin: 10 bytes, but .*a\.idx promises 8"):
        write_index(tmp_path, [2, 2], [0, 4], [0, 2], 10)


@pytest.mark.parametrize("block", [1, 2, 3, 1000])
def test_blocks_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(token_index, "_BLOCK_ENTRIES", block)
    assert TokenFile(written_by_us(tmp_path)).num_documents == len(ONE_SEQUENCE_EACH)
    documents = [*NONE_OR_ONE, [[5, 6], [7], []], []]
    assert write_packed(tmp_path / "a", documents, "H").num_documents == len(documents)


def test_a_sum_past_every_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it overflows, as so many sequences would that no test can write them: the limit is lowered instead."""
    monkeypatch.setattr(token_index, "_MAX_BYTES", 2**33)
    longest = 2**31 - 1
    with pytest.raises(DataError, match="its first 3 sequences have 12884901882 bytes; the index is damaged"):
        write_index(tmp_path, [longest] * 3, [2 * longest * n for n in range(3)], [0, 3], 0)


def test_the_memory_to_check_an_index_is_bounded(tmp_path: Path) -> None:
    """An index of 20 MB."""
    num_sequences = 1_000_000
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, num_sequences, num_sequences + 1)
    index += np.full(num_sequences, 1, "<i4").tobytes() + np.arange(0, 2 * num_sequences, 2, "<i8").tobytes()
    (tmp_path / "a.idx").write_bytes(index + np.arange(num_sequences + 1, dtype="<i8").tobytes())
    (tmp_path / "a.bin").write_bytes(bytes(2 * num_sequences))
    tracemalloc.start()
    TokenFile(tmp_path / "a")
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert memory < 3_000_000


def test_the_packed_format_is_the_one_under_test(tmp_path: Path) -> None:
    written_by_us(tmp_path)
    assert (tmp_path / "a.idx").read_bytes() == pack_token_file(ONE_SEQUENCE_EACH, "i")[1]
