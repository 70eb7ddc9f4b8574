"""Batches of one data-parallel rank, from a position that is one integer on every topology.

The global batch at position p is the samples [p, p + global_batch_size) of the order, without those that are left out,
however many ranks and micro batches share it.

Shape suffixes: B samples of a micro batch, S = seq_length, N samples of a rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from megalibi.config.sample_ranges import SampleRanges
from megalibi.data.dataset import Dataset
from megalibi.data.hashing import hash_samples, sum_hashes
from megalibi.data.schedule import Int64Array
from megalibi.data.skipping import KeptSamples
from megalibi.errors import ConfigError
from megalibi.parallel import IGNORED_LABEL


@dataclass(frozen=True)
class Batch:
    """One micro batch.

    With a document mask, attention stops at document boundaries but the labels stay: the end-of-document token goes on
    to predict the next document's first token, so that masking does not change which tokens the loss is averaged over
    (Megatron-LM does the same unless it is told to mask the loss of that token).
    """

    tokens: torch.Tensor
    """The token ids that the model reads, int64 [B, S]."""

    labels: torch.Tensor
    """The id that follows each token, int64 [B, S]; IGNORED_LABEL where there is no loss."""

    cu_seqlens: torch.Tensor | None
    """Document boundaries over the B * S flattened tokens, those of the rows included, int32; None without a document
    mask."""

    sample_hash: int
    """Sum of the samples' hashes modulo 2**64, as a signed integer: ranks and micro batches add up by an int64 sum."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; the document boundaries stay on the host, where the model reads them."""
        if device.type != "cuda":
            return replace(self, tokens=self.tokens.to(device), labels=self.labels.to(device))
        # From pinned memory, or the host waits for the copy.
        tokens, labels = (x.pin_memory().to(device, non_blocking=True) for x in (self.tokens, self.labels))
        return replace(self, tokens=tokens, labels=labels)


class Loader:
    """Reads the training batches of one data-parallel rank; a thread reads the next global batch ahead.

    Args:
        dataset: The samples and their order.
        global_batch_size: Samples of a step, over all ranks.
        micro_batch_size: Samples of one forward pass on one rank.
        data_rank: This rank's place in its data-parallel group.
        data_size: Number of data-parallel ranks.
        document_mask: Whether batches carry document boundaries.
        left_out: The numbers of the samples that are left out of the order.

    Raises:
        ConfigError: If micro_batch_size * data_size does not divide global_batch_size.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        document_mask: bool = False,
        left_out: SampleRanges = SampleRanges(),  # noqa: B008 - it is frozen
    ) -> None:
        if global_batch_size % (micro_batch_size * data_size):
            raise ConfigError(
                f"train.global_batch_size={global_batch_size}: must be a multiple of train.micro_batch_size="
                f"{micro_batch_size} times {data_size} data-parallel ranks"
            )
        self._dataset = dataset
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._document_mask = document_mask
        self._kept = KeptSamples(left_out)
        # Micro batch m of rank r is the m-th group's r-th part.
        self._offsets_MB = np.arange(global_batch_size).reshape(-1, data_size, micro_batch_size)[:, data_rank]
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megalibi-loader")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def micro_batches(self, samples_consumed: int) -> list[Batch]:
        """Return this rank's micro batches of the global batch that begins at a position.

        Args:
            samples_consumed: Samples that the whole job consumed before: the position in the data.

        Raises:
            DataError: If the data holds a token past the vocabulary.
        """
        if self._ahead is not None and self._ahead[0] == samples_consumed:
            batches = self._ahead[1].result()
        else:
            batches = self._load(samples_consumed)
        following = samples_consumed + self._global_batch_size
        self._ahead = (following, self._executor.submit(self._load, following))
        return batches

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._executor.shutdown(cancel_futures=True)

    def _load(self, samples_consumed: int) -> list[Batch]:
        indices_N = self._kept.numbers_at(samples_consumed + self._offsets_MB.reshape(-1))
        ids_N2 = self._dataset.sample_ids(indices_N)
        return _read_batches(self._dataset, ids_N2, self._micro_batch_size, self._document_mask)


class ValidationLoader:
    """The first samples of a dataset's order, once, split over the data-parallel ranks.

    All ranks get equally many batches of the same shape, for they meet in collectives. Rows past the last sample
    repeat the first one with IGNORED_LABEL for labels: the sum of the losses over the count of the labels that are not
    ignored, both summed over the ranks, is the exact mean.

    Args:
        dataset: The samples and their order.
        num_samples: Samples to read, none of them twice; fewer if the dataset has no more.
        micro_batch_size: Samples of one forward pass on one rank.
        data_rank: This rank's place in its data-parallel group.
        data_size: Number of data-parallel ranks.
        document_mask: Whether batches carry document boundaries.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        num_samples: int,
        micro_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        document_mask: bool = False,
    ) -> None:
        self._ids_N2 = dataset.distinct_sample_ids(num_samples)
        self.num_samples = len(self._ids_N2)
        self._dataset = dataset
        self._micro_batch_size = micro_batch_size
        self._data_rank = data_rank
        self._data_size = data_size
        self._document_mask = document_mask

    def __len__(self) -> int:
        return -(-self.num_samples // (self._micro_batch_size * self._data_size))

    def __iter__(self) -> Iterator[Batch]:
        for group in range(len(self)):
            first = (group * self._data_size + self._data_rank) * self._micro_batch_size
            indices_B = np.arange(first, first + self._micro_batch_size)
            num_real = int(np.clip(self.num_samples - first, 0, self._micro_batch_size))
            indices_B[num_real:] = 0
            ids_B2 = self._ids_N2[indices_B]
            yield _read_batches(self._dataset, ids_B2, self._micro_batch_size, self._document_mask, num_real)[0]


def _read_batches(
    dataset: Dataset, ids_N2: Int64Array, micro_batch_size: int, document_mask: bool, num_real: int | None = None
) -> list[Batch]:
    """Read samples and cut them into micro batches; rows from ``num_real`` on are padding."""
    num_real = len(ids_N2) if num_real is None else num_real
    tokens_NT = dataset.read(ids_N2)
    hashes_N = hash_samples(ids_N2[:num_real], tokens_NT[:num_real])
    inputs_NS = torch.from_numpy(np.ascontiguousarray(tokens_NT[:, :-1]))
    labels_NS = torch.from_numpy(np.ascontiguousarray(tokens_NT[:, 1:]))
    labels_NS[num_real:] = IGNORED_LABEL
    batches = []
    for start in range(0, len(ids_N2), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        cu_seqlens = _document_boundaries(dataset, ids_N2[rows]) if document_mask else None
        batches.append(Batch(inputs_NS[rows], labels_NS[rows], cu_seqlens, sum_hashes(hashes_N[rows])))
    return batches


def _document_boundaries(dataset: Dataset, ids_B2: Int64Array) -> torch.Tensor:
    boundaries: list[Int64Array] = [np.arange(len(ids_B2) + 1) * dataset.seq_length]
    for row, offsets in enumerate(dataset.document_starts(ids_B2)):
        boundaries.append(row * dataset.seq_length + offsets)
    return torch.from_numpy(np.unique(np.concatenate(boundaries)).astype(np.int32))
