from __future__ import annotations

import numpy as np
import pytest

from megalibi.config import Config, learning_rate_at
from megalibi.config.sample_ranges import SampleRanges
from megalibi.data.dataset import Dataset, open_dataset
from megalibi.data.loader import Loader
from megalibi.data.schedule import Int64Array
from megalibi.data.skipping import KeptSamples
from megalibi.data.tokens.token_file import TokenFile
from megalibi.engine.step import StepResult, train_step
from tests.support.ranks import run_on_ranks
from tests.support.runs import CPU, VOCAB_SIZE, build, make_config, open_loader


class Shortened:
    """An order that never had some samples: a list of all the others."""

    def __init__(self, dataset: Dataset, gone: list[int], length: int) -> None:
        self._dataset = dataset
        self._ids_N2 = np.delete(dataset.sample_ids(np.arange(length)), gone, axis=0)
        self.seq_length = dataset.seq_length
        self.token_files: list[TokenFile] = dataset.token_files

    def sample_ids(self, indices_N: Int64Array) -> Int64Array:
        return self._ids_N2[indices_N]

    def distinct_sample_ids(self, num_samples: int) -> Int64Array:
        return self._ids_N2[:num_samples]

    def read(self, ids_N2: Int64Array) -> Int64Array:
        return self._dataset.read(ids_N2)

    def document_starts(self, ids_N2: Int64Array) -> list[Int64Array]:
        return self._dataset.document_starts(ids_N2)


@pytest.mark.parametrize("texts", [[], ["0"], ["0-6", "9", "11-40"], ["3-9", "5-12", "30-130"], ["400-500"]])
def test_kept_samples_are_all_the_others_in_their_order(texts: list[str]) -> None:
    ranges = SampleRanges.parse(texts)
    gone = [number for first, last in ranges.ranges for number in range(first, last + 1)]
    kept = np.delete(np.arange(600), gone)
    positions = np.random.default_rng(0).permutation(300).reshape(3, 100)
    numbers = KeptSamples(ranges).numbers_at(positions)
    assert numbers.dtype == np.int64
    assert (numbers == kept[positions]).all()
    assert [ranges.number_at(position) for position in range(300)] == kept[:300].tolist()


def train(config: Config, dataset: Dataset | None, steps: int) -> list[StepResult]:
    """Train with what the configuration leaves out, or on a dataset that never had it."""
    engine, groups = build(config)
    sizes = {"data_rank": groups.data.rank, "data_size": groups.data.size}
    if dataset is None:
        loader = open_loader(config, **sizes)
    else:
        loader = Loader(
            dataset,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            **sizes,
        )
    results = []
    for step in range(steps):
        consumed = step * config.train.global_batch_size
        results.append(
            train_step(
                engine,
                loader.micro_batches(consumed),
                groups=groups,
                device=CPU,
                learning_rate=learning_rate_at(step, config.optimizer, config.train.steps),
                seed=config.train.seed,
                samples_consumed=consumed,
            )
        )
    loader.close()
    engine.destroy()
    return results


def train_both(config: Config, whole: Config, gone: list[int]) -> tuple[list[StepResult], ...]:
    dataset = open_dataset(
        config.data.train[0].prefix, seq_length=config.data.seq_length, seed=config.train.seed, vocab_size=VOCAB_SIZE
    )
    shortened = Shortened(dataset, gone, 100)
    return train(config, None, 4), train(whole, shortened, 4), train(whole, None, 4)


def test_a_run_that_skips_is_digit_for_digit_one_whose_data_never_had_the_samples(prefix: str) -> None:
    """With dropout, whose masks follow the position; the first two steps come before anything is left out."""
    sections = {"model": {"dropout": 0.1}, "train": {"micro_batch_size": 2}}
    skipping = make_config(prefix, **sections, data={"skip": ["16-23", "27"]})
    for ours, shortened, whole in run_on_ranks(
        2, train_both, skipping, make_config(prefix, **sections), [*range(16, 24), 27]
    ):
        assert ours == shortened
        assert ours[:2] == whole[:2]
        assert ours[2] != whole[2]
