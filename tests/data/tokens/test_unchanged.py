from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from megalibi.data.dataset import TokenDataset, open_dataset
from megalibi.data.tokens.token_file import TokenFile, TokenFileWriter
from megalibi.errors import DataError
from tests.support.faults import change_byte

SAMPLES = np.array([[0, 0], [0, 7]])


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    with TokenFileWriter(tmp_path / "set", 100) as writer:
        for document in range(20):
            writer.add_document(np.arange(1_000) % (document + 2))
    return str(tmp_path / "set")


def open_set(prefix: str) -> TokenDataset:
    dataset = open_dataset(prefix, seq_length=64, seed=1, vocab_size=100)
    assert isinstance(dataset, TokenDataset)
    return dataset


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_byte_that_changes_under_a_reader_is_found_though_its_time_is_put_back(prefix: str, suffix: str) -> None:
    dataset = open_set(prefix)
    assert dataset.token_file.identity
    dataset.read(SAMPLES)
    change_byte(Path(prefix + suffix), 100)
    message = rf"set{suffix}: changed while it is being read \(of the same size\): put the file back as it was"
    for _ in range(2):  # it stays changed
        with pytest.raises(DataError, match=message):
            dataset.read(SAMPLES)
    change_byte(Path(prefix + suffix), 100)
    dataset.read(SAMPLES)


def test_a_file_that_is_cut_under_a_reader_is_an_error_and_no_sigbus(prefix: str) -> None:
    dataset = open_set(prefix)
    dataset.read(SAMPLES)
    os.truncate(f"{prefix}.bin", 100)
    with pytest.raises(DataError, match=r"set\.bin: changed while it is being read \(40000 bytes then, 100 now\)"):
        dataset.read(SAMPLES)


def test_a_file_that_is_touched_replaced_or_deleted_is_read_on(prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    dataset, tokens = open_set(prefix), Path(f"{prefix}.bin")
    assert dataset.token_file.identity
    expected = dataset.read(SAMPLES).tolist()

    def replace() -> None:
        tokens.with_suffix(".other").write_bytes(bytes(len(tokens.read_bytes())))
        tokens.with_suffix(".other").replace(tokens)

    with caplog.at_level("WARNING", "megalibi"):
        for change, words in (
            (lambda: os.utime(tokens, (0, 0)), "set.bin was touched while it is being read; its size"),
            (replace, "set.bin was deleted or replaced: this run goes on with the file that it has opened"),
            (Path(f"{prefix}.idx").unlink, "set.idx was deleted or replaced: this run goes on with"),
        ):
            change()
            for _ in range(2):
                assert dataset.read(SAMPLES).tolist() == expected
            (message,) = caplog.messages  # once for each change
            assert words in message
            caplog.clear()


def test_where_nobody_knows_what_it_was_no_change_is_taken(prefix: str) -> None:
    dataset = open_set(prefix)
    os.utime(f"{prefix}.bin", (2, 2))
    with pytest.raises(DataError, match="changed while it is being read"):
        dataset.read(SAMPLES)


def test_the_identity_tells_a_changed_byte_anywhere_in_a_small_file(prefix: str) -> None:
    identity = TokenFile(prefix).identity
    for place in (0, 12_345, 39_999):
        change_byte(Path(f"{prefix}.bin"), place)
        assert TokenFile(prefix).identity != identity
        change_byte(Path(f"{prefix}.bin"), place)
    assert TokenFile(prefix).identity == identity
    os.truncate(f"{prefix}.bin", 39_999)
    with pytest.raises(DataError, match=r"set\.bin: truncated, 39999 bytes of the 40000 that .*set\.idx promises"):
        TokenFile(prefix)
