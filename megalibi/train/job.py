"""What a run is on this rank, from its first step to its last: configuration, data, groups and device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megalibi.checkpoint import CHECKPOINTS, find_left_out
from megalibi.config import Config, DatasetConfig, Derived
from megalibi.data.dataset import Dataset, open_dataset
from megalibi.data.loader import Loader, ValidationLoader
from megalibi.data.tokens.identity import DataIdentity
from megalibi.metrics.records import RollbackRecord
from megalibi.parallel import ProcessGroups


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data that a run learns from, opened and checked once."""

    train: Dataset
    """The samples of data.train, to train on."""
    valid: Dataset | None
    """The samples of data.valid; None if nothing is validated."""
    identity: DataIdentity
    """What tells this data from other data, wherever it stands."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What stays the same from the first step to the last."""

    config: Config
    """The configuration of the run."""
    derived: Derived
    """The numbers that follow from it on this number of ranks."""
    data: RunData
    """The data that the run learns from."""
    groups: ProcessGroups
    """The groups of ranks that this process is in."""
    device: torch.device
    """The device on which this rank computes."""
    failures_file: Path | None = None
    """Deleted by rank 0 when a checkpoint of new steps is complete: whoever starts the job counts failures in it."""


def open_split(config: Config, split: tuple[DatasetConfig, ...]) -> Dataset:
    """Open the token files of data.train or data.valid.

    Raises:
        UserError: A token file is missing or damaged, or does not fit the model.
    """
    return open_dataset(
        [(dataset.prefix, dataset.weight) for dataset in split],
        seq_length=config.data.seq_length,
        seed=config.train.seed,
        vocab_size=config.model.vocab_size,
    )


def open_loader(job: Job, rollbacks: Iterable[RollbackRecord] = ()) -> Loader:
    """Return what reads this rank's batches of data.train.

    Args:
        job: The run.
        rollbacks: The loss spikes that took it back, whose samples are left out.
    """
    config, groups = job.config, job.groups
    return Loader(
        job.data.train,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_rank=groups.data.rank,
        data_size=groups.data.size,
        document_mask=config.data.document_mask,
        left_out=find_left_out(config, rollbacks),
    )


def open_validation(job: Job) -> ValidationLoader:
    """Return what reads this rank's batches of a validation: the first ``train.eval_samples`` samples of data.valid."""
    config, groups = job.config, job.groups
    assert job.data.valid is not None
    return ValidationLoader(
        job.data.valid,
        num_samples=config.train.eval_samples,
        micro_batch_size=config.train.micro_batch_size,
        data_rank=groups.data.rank,
        data_size=groups.data.size,
        document_mask=config.data.document_mask,
    )


def checkpoints_folder(config: Config) -> Path:
    """Return the run's folder of checkpoints."""
    return Path(config.train.output_dir) / CHECKPOINTS


def validation_is_due(config: Config, step: int) -> bool:
    """Return whether a validation follows a step, in a run that has data.valid."""
    return step == config.train.steps or is_due(step, config.train.eval_every_steps)


def is_due(step: int, every_steps: int) -> bool:
    """Return whether something that happens every so many steps happens after this one; it never does with 0."""
    return every_steps > 0 and step % every_steps == 0
