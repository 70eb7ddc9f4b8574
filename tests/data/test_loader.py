from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megalibi.data.dataset import open_dataset
from megalibi.data.hashing import format_sample_hash, hash_samples, sum_hashes
from megalibi.data.loader import Loader, ValidationLoader
from megalibi.errors import ConfigError, DataError
from megalibi.parallel import IGNORED_LABEL
from tests.support.device import DEVICE
from tests.support.ranks import run_on_ranks


@pytest.fixture
def spec(write_tokens):
    """A blend of two sets with 103 and 52 documents."""
    rng = np.random.default_rng(0)
    sets = [[rng.integers(0, 90, size=rng.integers(1, 40)) for _ in range(count)] for count in (103, 52)]
    return [(write_tokens(sets[0], "set0"), 0.6), (write_tokens(sets[1], "set1"), 0.4)]


def open_blend(spec, **kwargs):
    return open_dataset(spec, **{"seq_length": 16, "seed": 5, "vocab_size": 90, **kwargs})


def test_batches_are_the_samples_of_the_order(spec):
    dataset = open_blend(spec)
    loader = Loader(dataset, global_batch_size=12, micro_batch_size=3)
    for step in range(3):
        expected = dataset.read(dataset.sample_ids(np.arange(12 * step, 12 * step + 12)))
        batches = loader.micro_batches(12 * step)
        assert torch.cat([batch.tokens for batch in batches]).tolist() == expected[:, :-1].tolist()
        assert torch.cat([batch.labels for batch in batches]).tolist() == expected[:, 1:].tolist()
        for batch in batches:
            assert batch.tokens.dtype == batch.labels.dtype == torch.int64
            assert batch.tokens.shape == (3, 16)
            assert batch.cu_seqlens is None


@pytest.mark.parametrize(("micro_batch_size", "data_size"), [(1, 1), (2, 3), (6, 1), (1, 4), (4, 3), (12, 1)])
def test_global_batch_and_hash_are_the_same_on_every_topology(spec, micro_batch_size, data_size):
    dataset = open_blend(spec)
    ids = dataset.sample_ids(np.arange(24, 36))
    reference = dataset.read(ids)
    loaders = [
        Loader(dataset, global_batch_size=12, micro_batch_size=micro_batch_size, data_rank=rank, data_size=data_size)
        for rank in range(data_size)
    ]
    per_rank = [loader.micro_batches(24) for loader in loaders]
    in_order = [batches[m] for m in range(len(per_rank[0])) for batches in per_rank]
    assert torch.cat([batch.tokens for batch in in_order]).tolist() == reference[:, :-1].tolist()
    total = sum(batch.sample_hash for batch in in_order)
    assert format_sample_hash(total) == format_sample_hash(sum_hashes(hash_samples(ids, reference)))


def sum_hashes_over_ranks(spec, micro_batch_size):
    loader = Loader(
        open_blend(spec),
        global_batch_size=12,
        micro_batch_size=micro_batch_size,
        data_rank=dist.get_rank(),
        data_size=dist.get_world_size(),
    )
    hashes = torch.tensor(sum(torch.tensor(batch.sample_hash) for batch in loader.micro_batches(36)))
    dist.all_reduce(hashes)
    return format_sample_hash(int(hashes))


def test_hashes_add_up_by_an_int64_all_reduce(spec):
    one_process = Loader(open_blend(spec), global_batch_size=12, micro_batch_size=12).micro_batches(36)
    expected = format_sample_hash(one_process[0].sample_hash)
    assert run_on_ranks(2, sum_hashes_over_ranks, spec, 3) == [expected] * 2
    assert run_on_ranks(2, sum_hashes_over_ranks, spec, 2) == [expected] * 2


def test_position_is_one_integer(spec):
    """A loader that starts at a position reads what one that came there read, and may jump."""
    straight = Loader(open_blend(spec), global_batch_size=8, micro_batch_size=4)
    seen = {position: straight.micro_batches(position) for position in range(0, 80, 8)}
    for position in (40, 48, 16, 72):
        resumed = Loader(open_blend(spec), global_batch_size=8, micro_batch_size=4).micro_batches(position)
        jumped = straight.micro_batches(position)
        for other in (resumed, jumped):
            assert [batch.sample_hash for batch in other] == [batch.sample_hash for batch in seen[position]]
            assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(other, seen[position], strict=True))


def test_the_next_global_batch_is_read_ahead_by_another_thread(spec):
    dataset = open_blend(spec)
    readers = []
    read = dataset.read
    dataset.read = lambda ids: readers.append(threading.current_thread().name) or read(ids)
    loader = Loader(dataset, global_batch_size=4, micro_batch_size=4)
    for step in range(3):
        loader.micro_batches(4 * step)
    loader.close()
    assert readers[0] == "MainThread"
    assert all(name.startswith("megalibi-loader") for name in readers[1:])
    assert 3 <= len(readers) <= 4


def test_an_error_of_the_reading_thread_reaches_the_caller(write_tokens):
    prefix = write_tokens([[1] * 8 + [5] + [1] * 8])
    dataset = open_dataset(prefix, seq_length=4, seed=0, vocab_size=6, shuffle=False)
    dataset._vocab_size = 5
    loader = Loader(dataset, global_batch_size=1, micro_batch_size=1)
    loader.micro_batches(0)
    with pytest.raises(DataError, match="token 8 is id 5, past vocab_size=5"):
        loader.micro_batches(1)


def test_document_boundaries(spec):
    dataset = open_blend(spec, shuffle=False)
    stream_starts = {
        number: set(dataset._datasets[number].token_file.document_starts_between(0, 10**9).tolist())
        for number in (0, 1)
    }
    [batch] = Loader(dataset, global_batch_size=6, micro_batch_size=6, document_mask=True).micro_batches(0)
    expected = {0}
    for row, (number, place) in enumerate(dataset.sample_ids(np.arange(6)).tolist()):
        expected.add(16 * (row + 1))
        expected |= {16 * row + t for t in range(16) if 16 * place + t in stream_starts[number]}
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == sorted(expected)
    assert len(expected) > 7
    assert (batch.labels != IGNORED_LABEL).all()


def test_empty_documents_make_no_empty_segments(write_tokens):
    dataset = open_dataset(write_tokens([[1], [], [], [2, 3], [4]]), seq_length=3, seed=0, vocab_size=9)
    [batch] = Loader(dataset, global_batch_size=1, micro_batch_size=1, document_mask=True).micro_batches(0)
    assert batch.cu_seqlens.tolist() == [0, 1, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("document_mask", [False, True])
def test_a_batch_goes_to_the_device_but_for_its_document_boundaries(write_tokens, document_mask):
    dataset = open_dataset(write_tokens([[1], [2, 3], [4]]), seq_length=3, seed=0, vocab_size=9)
    [batch] = Loader(dataset, global_batch_size=1, micro_batch_size=1, document_mask=document_mask).micro_batches(0)
    moved = batch.to(torch.device(DEVICE))
    for name in ("tokens", "labels"):
        assert getattr(moved, name).device.type == DEVICE
        assert torch.equal(getattr(moved, name).cpu(), getattr(batch, name))
    assert moved.cu_seqlens is batch.cu_seqlens
    assert moved.sample_hash == batch.sample_hash


def test_indivisible_batch():
    with pytest.raises(
        ConfigError, match=r"train\.global_batch_size=10: must be a multiple of train\.micro_batch_size=2 tim"
    ):
        Loader(None, global_batch_size=10, micro_batch_size=2, data_size=2)  # type: ignore


def open_validation(dataset, num_samples, micro_batch_size, data_size):
    """Return the loaders of all data ranks."""
    return [
        ValidationLoader(
            dataset,
            num_samples=num_samples,
            micro_batch_size=micro_batch_size,
            data_rank=rank,
            data_size=data_size,
            document_mask=True,
        )
        for rank in range(data_size)
    ]


@pytest.mark.parametrize(("micro_batch_size", "data_size"), [(1, 1), (2, 2), (4, 3), (16, 1)])
@pytest.mark.parametrize("num_samples", [1, 7, 12])
def test_validation_reads_the_first_samples_once(spec, num_samples, micro_batch_size, data_size):
    dataset = open_blend(spec, shuffle=False)
    loaders = open_validation(dataset, num_samples, micro_batch_size, data_size)
    batches = [batch for group in zip(*loaders, strict=True) for batch in group]
    assert len(batches) == data_size * len(loaders[0])
    assert all(batch.tokens.shape == (micro_batch_size, 16) for batch in batches)
    tokens, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "labels"))
    ids = dataset.sample_ids(np.arange(num_samples))
    expected = dataset.read(ids)
    assert tokens[:num_samples].tolist() == expected[:, :-1].tolist()
    assert labels[:num_samples].tolist() == expected[:, 1:].tolist()
    assert (labels[num_samples:] == IGNORED_LABEL).all()
    assert (tokens[num_samples:] >= 0).all()
    total = sum(batch.sample_hash for batch in batches)
    assert format_sample_hash(total) == format_sample_hash(sum_hashes(hash_samples(ids, expected)))


def test_validation_never_reads_a_sample_twice(write_tokens):
    dataset = open_dataset(write_tokens([[1] * 33]), seq_length=4, seed=0, vocab_size=9, shuffle=False)
    loader = ValidationLoader(dataset, num_samples=100, micro_batch_size=3)
    assert loader.num_samples == 8
    assert len(list(loader)) == 3


@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_validation_reads_every_set_of_a_blend_to_its_end(write_tokens, micro_batch_size, data_size):
    """One sample, two and six: what is read is written out here, by the sets' first tokens."""
    sets = [(write_tokens([range(100 * i, 100 * i + 4 * n + 1)], str(i)), 1.0) for i, n in ((1, 1), (2, 2), (3, 6))]
    dataset = open_dataset(sets, seq_length=4, seed=0, vocab_size=400, shuffle=False)
    for num_samples, expected in ((5, [100, 200, 300, 204, 304]), (16, [100, 200, 300, 204, 304, 308, 312, 316, 320])):
        loaders = open_validation(dataset, num_samples, micro_batch_size, data_size)
        assert {loader.num_samples for loader in loaders} == {len(expected)}
        batches = [batch for group in zip(*loaders, strict=True) for batch in group]
        real = torch.cat([batch.tokens[batch.labels[:, 0] != IGNORED_LABEL] for batch in batches])
        assert real[:, 0].tolist() == expected
