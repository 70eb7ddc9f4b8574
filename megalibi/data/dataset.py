"""Samples of seq_length + 1 tokens: from one token file, or from a weighted blend of several.

Every sample is named by two integers, its set and its place in that set's stream, so that what a run consumed can be
proved. A dataset first says which samples an order index means (``sample_ids``) and then reads them.

Shape suffixes: N samples, T = seq_length + 1 tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megalibi.data.hashing import hash64
from megalibi.data.permutation import permute
from megalibi.data.schedule import BlendSchedule, Int64Array
from megalibi.data.tokens.token_file import TokenFile, check_ids, check_token_ids
from megalibi.errors import ConfigError


class Dataset(Protocol):
    """What a loader reads: an endless order of samples."""

    @property
    def seq_length(self) -> int:
        """Tokens that a sample feeds to the model; it is one longer, for the last label."""

    @property
    def token_files(self) -> list[TokenFile]:
        """Where the samples are."""

    def sample_ids(self, indices_N: Int64Array) -> Int64Array:
        """Return [N, 2]: set number and place in its stream of the samples at these indices of the order."""

    def distinct_sample_ids(self, num_samples: int) -> Int64Array:
        """Return [N, 2] of the first samples of the order, each once; N is smaller if there are no more."""

    def read(self, ids_N2: Int64Array) -> Int64Array:
        """Return the tokens [N, seq_length + 1] of the samples."""

    def document_starts(self, ids_N2: Int64Array) -> list[Int64Array]:
        """Return for each sample the offsets in [0, seq_length) at which documents begin."""


class TokenDataset:
    """The samples of one token file, for any number of epochs.

    Sample k is the tokens [k * seq_length, (k + 1) * seq_length] of the stream, across documents; its last token is the
    next sample's first, so every token but the first is a label exactly once. The order of an epoch is a keyed
    permutation, computed and never stored.

    Args:
        token_file: Where the tokens are.
        seq_length: Tokens that a sample feeds to the model.
        seed: Orders of different seeds are unrelated.
        shuffle: False reads the stream in order.
        dataset_id: This set's number in a blend; sets of different numbers have unrelated orders.
        vocab_size: If given, every id that is read is checked against it.

    Raises:
        ConfigError: If the file is too short for one sample.
    """

    def __init__(
        self,
        token_file: TokenFile,
        seq_length: int,
        seed: int,
        *,
        shuffle: bool = True,
        dataset_id: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        self.token_file = token_file
        self.token_files = [token_file]
        self.seq_length = seq_length
        self.samples_per_epoch = (token_file.num_tokens - 1) // seq_length
        self._seed = seed
        self._shuffle = shuffle
        self._dataset_id = dataset_id
        self._vocab_size = vocab_size
        if self.samples_per_epoch < 1:
            raise ConfigError(
                f"data.seq_length={seq_length}: must be below the number of tokens in {token_file.bin_path}, "
                f"which holds {token_file.num_tokens}: a sample takes {seq_length + 1}"
            )

    def sample_ids(self, indices_N: Int64Array) -> Int64Array:
        """See Dataset."""
        epochs_N, places_N = np.divmod(indices_N, self.samples_per_epoch)
        if self._shuffle:
            places_N = permute(places_N, self.samples_per_epoch, hash64(self._seed, self._dataset_id, epochs_N))
        return np.stack([np.full_like(places_N, self._dataset_id), places_N], axis=1)

    def distinct_sample_ids(self, num_samples: int) -> Int64Array:
        """See Dataset."""
        return self.sample_ids(np.arange(min(num_samples, self.samples_per_epoch)))

    def read(self, ids_N2: Int64Array) -> Int64Array:
        """See Dataset.

        Raises:
            DataError: If a token is not in the vocabulary, or the file has changed.
        """
        tokens_NT = np.empty((len(ids_N2), self.seq_length + 1), np.int64)
        self.token_file.check_unchanged()  # first, for a file that was cut ends the process that reads it
        for row, place in enumerate(ids_N2[:, 1].tolist()):
            tokens_NT[row] = self.token_file.read(place * self.seq_length, self.seq_length + 1)
        self.token_file.check_unchanged()  # again, for what was read may be what came meanwhile
        # As uint64, a negative id is a huge one: one pass finds both.
        if self._vocab_size is not None and tokens_NT.size and tokens_NT.view(np.uint64).max() >= self._vocab_size:
            for tokens_T, place in zip(tokens_NT, ids_N2[:, 1].tolist(), strict=True):
                check_ids(tokens_T, self._vocab_size, self.token_file, place * self.seq_length)
        return tokens_NT

    def document_starts(self, ids_N2: Int64Array) -> list[Int64Array]:
        """See Dataset."""
        starts = (ids_N2[:, 1] * self.seq_length).tolist()
        return [self.token_file.document_starts_between(start, start + self.seq_length) - start for start in starts]


class BlendedDataset:
    """Several datasets, one order: every prefix holds each set's share to within one sample.

    Args:
        datasets: The sets; all have the same seq_length.
        weights: Their shares, of any scale.

    Raises:
        ConfigError: If the weights cannot be blended; see BlendSchedule.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float]) -> None:
        self._datasets = list(datasets)
        self._schedule = BlendSchedule(weights)
        self.token_files = [token_file for dataset in datasets for token_file in dataset.token_files]
        self.seq_length = datasets[0].seq_length

    def sample_ids(self, indices_N: Int64Array) -> Int64Array:
        """See Dataset."""
        numbers_N, set_indices_N = self._schedule.locate(indices_N)
        ids_N2 = np.empty((len(indices_N), 2), np.int64)
        ids_N2[:, 0] = numbers_N
        for number in np.unique(numbers_N).tolist():
            rows = numbers_N == number
            ids_N2[rows, 1] = self._datasets[number].sample_ids(set_indices_N[rows])[:, 1]
        return ids_N2

    def distinct_sample_ids(self, num_samples: int) -> Int64Array:
        """See Dataset; a set that is used up has no more turns, and the others go on."""
        ids = [dataset.distinct_sample_ids(num_samples) for dataset in self._datasets]
        turns = [self._schedule.position_of(number, np.arange(len(of_set))) for number, of_set in enumerate(ids)]
        ids_N2 = np.concatenate(ids)
        ids_N2[:, 0] = np.repeat(np.arange(len(ids)), list(map(len, ids)))
        return ids_N2[np.argsort(np.concatenate(turns))][:num_samples]

    def read(self, ids_N2: Int64Array) -> Int64Array:
        """See Dataset."""
        tokens_NT = np.empty((len(ids_N2), self.seq_length + 1), np.int64)
        for number in np.unique(ids_N2[:, 0]).tolist():
            rows = ids_N2[:, 0] == number
            tokens_NT[rows] = self._datasets[number].read(ids_N2[rows])
        return tokens_NT

    def document_starts(self, ids_N2: Int64Array) -> list[Int64Array]:
        """See Dataset."""
        return [self._datasets[ids_2[0]].document_starts(ids_2[None])[0] for ids_2 in ids_N2]


def open_dataset(
    spec: str | Sequence[tuple[str, float]], *, seq_length: int, seed: int, vocab_size: int, shuffle: bool = True
) -> Dataset:
    """Open one token file, or a blend of several.

    Args:
        spec: A PREFIX, or pairs of PREFIX and weight.
        seq_length: Tokens that a sample feeds to the model.
        seed: Decides the order.
        vocab_size: Ids from here on are an error.
        shuffle: False reads every set in order; a blend still alternates between them.

    Raises:
        ConfigError: If ``spec`` names no file, or a file is too short for one sample.
        DataError: If a file is missing, truncated, foreign, or holds ids past the vocabulary.
    """
    pairs = [(spec, 1.0)] if isinstance(spec, str) else list(spec)
    if not pairs:
        raise ConfigError("data: names no token file; must be a PREFIX or a list of {prefix, weight}")
    datasets = []
    for number, (prefix, _) in enumerate(pairs):
        token_file = TokenFile(prefix)
        datasets.append(
            TokenDataset(token_file, seq_length, seed, shuffle=shuffle, dataset_id=number, vocab_size=vocab_size)
        )
        check_token_ids(token_file, vocab_size)
    return datasets[0] if len(datasets) == 1 else BlendedDataset(datasets, [weight for _, weight in pairs])
