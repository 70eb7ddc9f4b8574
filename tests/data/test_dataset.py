from __future__ import annotations

import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalibi.data.dataset import BlendedDataset, TokenDataset, open_dataset
from megalibi.data.schedule import BlendSchedule
from megalibi.data.tokens.token_file import TokenFile
from megalibi.errors import ConfigError, DataError


def indices(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_samples_cover_the_stream_across_documents(write_tokens):
    dataset = open_dataset(
        write_tokens([list(range(7)), list(range(7, 10))]), seq_length=3, seed=1, vocab_size=10, shuffle=False
    )
    assert dataset.samples_per_epoch == 3
    ids = dataset.sample_ids(np.arange(3))
    assert ids.tolist() == [[0, 0], [0, 1], [0, 2]]
    assert dataset.read(ids).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert [starts.tolist() for starts in dataset.document_starts(ids)] == [[0], [], [1]]


@given(st.integers(2, 60), st.integers(1, 9), st.integers(0, 2**32))
def test_every_epoch_reads_every_sample_once(tmp_path_factory, num_tokens, seq_length, seed):
    from megalibi.data.tokens.token_file import TokenFileWriter

    prefix = tmp_path_factory.mktemp("epoch") / "a"
    with TokenFileWriter(prefix, 100) as writer:
        writer.add_document(range(num_tokens))
    if num_tokens <= seq_length:
        message = (
            f"data.seq_length={seq_length}: must be below the number of tokens in {prefix}.bin, which holds "
            f"{num_tokens}: a sample takes {seq_length + 1}"
        )
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            TokenDataset(TokenFile(prefix), seq_length, seed)
        return
    dataset = TokenDataset(TokenFile(prefix), seq_length, seed)
    size = dataset.samples_per_epoch
    assert size == (num_tokens - 1) // seq_length
    for epoch in (0, 1, 5):
        ids = dataset.sample_ids(epoch * size + np.arange(size))
        assert sorted(ids[:, 1].tolist()) == list(range(size))
        labels = np.sort(dataset.read(ids)[:, 1:].reshape(-1))
        assert labels.tolist() == list(range(1, size * seq_length + 1))


def test_order_depends_on_seed_epoch_and_set_and_on_nothing_else(write_tokens):
    token_file = TokenFile(write_tokens([[1] * 1001]))
    first = TokenDataset(token_file, 5, seed=1)
    everything = first.sample_ids(np.arange(600))[:, 1]
    assert everything[[17, 450, 3]].tolist() == first.sample_ids(indices(17, 450, 3))[:, 1].tolist()
    others = [
        TokenDataset(token_file, 5, seed=2).sample_ids(np.arange(200))[:, 1],
        TokenDataset(token_file, 5, seed=1, dataset_id=1).sample_ids(np.arange(200))[:, 1],
        everything[200:400],
    ]
    for other in others:
        assert np.count_nonzero(other == everything[:200]) < 20
        assert sorted(other.tolist()) == sorted(everything[:200].tolist())


def test_an_order_of_ten_to_the_twelve_samples_is_read_at_once(write_tokens):
    """Nothing in a dataset has the size of the data."""
    token_file = TokenFile(write_tokens([[1, 2, 3]]))
    token_file.num_tokens = 10**15 + 1
    start = time.process_time()
    dataset = TokenDataset(token_file, 1000, seed=1)
    ids = dataset.sample_ids(indices(0, 10**12 - 1, 10**12))
    assert time.process_time() - start < 0.1
    assert ids.max() < 10**12
    assert len(set(ids[:, 1].tolist())) == 3


def test_a_batch_with_an_id_past_the_vocabulary_is_an_error(write_tokens):
    token_file = TokenFile(write_tokens([[1] * 50 + [70_000] + [1] * 50]))
    dataset = TokenDataset(token_file, 4, seed=0, shuffle=False, vocab_size=70_000)
    dataset.read(dataset.sample_ids(indices(0, 1)))
    with pytest.raises(DataError, match=r"set\.bin: token 50 is id 70000, past vocab_size=70000"):
        dataset.read(dataset.sample_ids(indices(3, 12)))


def test_a_negative_id_is_an_error(write_tokens):
    token_file = TokenFile(write_tokens([[1] * 9 + [-1]]))
    with pytest.raises(DataError, match="token 9 is id -1"):
        TokenDataset(token_file, 9, seed=0, vocab_size=100_000).read(indices(0, 0)[None])


def test_opening_probes_the_ids(write_tokens):
    prefix = write_tokens([[1] * 50 + [12] + [1] * 50])
    with pytest.raises(DataError, match="token 50 is id 12, past vocab_size=12"):
        open_dataset(prefix, seq_length=4, seed=0, vocab_size=12)


def test_blend(write_tokens):
    spec = [
        (write_tokens([list(range(100, 141))], "a"), 0.75),
        (write_tokens([[200, 201], list(range(202, 241))], "b"), 0.25),
    ]
    dataset = open_dataset(spec, seq_length=4, seed=3, vocab_size=250)
    ids = dataset.sample_ids(np.arange(40))
    assert np.bincount(ids[:, 0]).tolist() == [30, 10]
    tokens = dataset.read(ids)
    assert (tokens[:, 0] == 100 * (ids[:, 0] + 1) + 4 * ids[:, 1]).all()
    assert sorted(ids[ids[:, 0] == 1, 1].tolist()) == list(range(10))
    assert dataset.sample_ids(indices(31, 7, 7)).tolist() == ids[[31, 7, 7]].tolist()
    starts = dataset.document_starts(np.array([[1, 0], [0, 0], [0, 3]]))
    assert [offsets.tolist() for offsets in starts] == [[0, 2], [0], []]


def walk(weights: list[float], lengths: list[int], num_samples: int) -> list[tuple[int, int]]:
    """Take turns as the weights say, and pass over a set that is used up; return pairs of set and how many before."""
    schedule, taken, read, turn = BlendSchedule(weights), [0] * len(weights), [], 0
    while len(read) < min(num_samples, sum(lengths)):
        number = int(schedule.locate(indices(turn))[0][0])
        if taken[number] < lengths[number]:
            read.append((number, taken[number]))
            taken[number] += 1
        turn += 1
    return read


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.8, 0.15, 0.05], [1, 50, 7.5]])
@pytest.mark.parametrize("lengths", [(1, 20, 3), (20, 1, 1), (7, 7, 7), (3, 1, 2)])
def test_the_distinct_samples_of_a_blend_go_on_when_a_set_is_used_up(write_tokens, weights, lengths):
    files = [TokenFile(write_tokens([[1] * (4 * length + 1)], str(i))) for i, length in enumerate(lengths)]
    sets = [TokenDataset(file, 4, seed=3, dataset_id=i) for i, file in enumerate(files)]
    blend = BlendedDataset(sets, weights)
    for num_samples in (1, 2, 5, 16, 100):
        expected = [
            sets[number].sample_ids(indices(index))[0].tolist() for number, index in walk(weights, lengths, num_samples)
        ]
        assert blend.distinct_sample_ids(num_samples).tolist() == expected
        assert len(expected) == min(num_samples, sum(lengths)) == len({tuple(pair) for pair in expected})


def test_until_a_set_is_used_up_the_distinct_samples_are_the_order_itself(write_tokens):
    files = [TokenFile(write_tokens([[1] * length], str(length))) for length in (41, 21)]
    blend = BlendedDataset([TokenDataset(file, 4, 0, dataset_id=i) for i, file in enumerate(files)], [1, 2])
    assert blend.distinct_sample_ids(7).tolist() == blend.sample_ids(np.arange(7)).tolist()  # 5 of the second set
    alone = TokenDataset(files[1], 4, 0)
    assert alone.distinct_sample_ids(9).tolist() == alone.sample_ids(np.arange(5)).tolist()


def test_a_set_of_little_weight_is_reached_without_a_walk(write_tokens):
    files = [TokenFile(write_tokens([[1] * length], str(length))) for length in (5, 4001)]
    sets = [TokenDataset(file, 4, 0, dataset_id=i) for i, file in enumerate(files)]
    start = time.process_time()
    ids = BlendedDataset(sets, [1, 0.000001]).distinct_sample_ids(1000)
    assert time.process_time() - start < 5
    assert ids[:, 0].tolist() == [0] + [1] * 999


def test_no_files():
    with pytest.raises(ConfigError, match="names no token file"):
        open_dataset([], seq_length=4, seed=0, vocab_size=12)
