"""Everything that can be wrong with a run, found before anything is allocated."""

from __future__ import annotations

from pathlib import Path

from megalibi.checkpoint import CHECKPOINTS, check_resumable
from megalibi.config import Config, Derived, derive
from megalibi.config.checks import refuse
from megalibi.data.provenance import identify_data
from megalibi.data.tokenizer.tokenizer import load_tokenizer
from megalibi.metrics.records import CONFIG_FILE, DIVERGED_FILE, INFO_FILE, METRICS_FILE
from megalibi.metrics.tensorboard import TENSORBOARD_FOLDER
from megalibi.runtime.hang import SIGNS_FOLDER, STACKS_FOLDER
from megalibi.runtime.outputs import check_folder
from megalibi.train.job import RunData, open_split
from megalibi.train.resume import find_resume


def check_run(config: Config, world_size: int) -> tuple[Derived, RunData]:
    """Find everything that is wrong with a run before anything is allocated.

    Returns:
        What follows from the configuration, and the run's data.

    Raises:
        UserError: With the field, its value and what it must be; or with what is wrong with data, checkpoint or folder.
    """
    derived = derive(config, world_size)
    check_run_folder(Path(config.train.output_dir))
    train = open_split(config, config.data.train)
    valid = open_split(config, config.data.valid) if config.data.valid else None
    tokenizer = None if config.data.tokenizer is None else load_tokenizer(config.data.tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        ids = f"the number of ids of data.tokenizer={config.data.tokenizer}"
        refuse("model.vocab_size", config.model.vocab_size, f"be at least {tokenizer.vocab_size}, {ids}")
    identity = identify_data(train.token_files, valid.token_files if valid else [], tokenizer)
    checkpoint = find_resume(config)
    if checkpoint is not None:
        check_resumable(checkpoint, config, identity)
    return derived, RunData(train=train, valid=valid, identity=identity)


def check_run_folder(folder: Path) -> None:
    """Check that a run can write its configuration, its metrics, its TensorBoard files and its checkpoints.

    Args:
        folder: The run's folder, train.output_dir.

    Raises:
        FileError: One of them cannot be written.
    """
    files = (CONFIG_FILE, INFO_FILE, METRICS_FILE, DIVERGED_FILE)
    folders = (TENSORBOARD_FOLDER, CHECKPOINTS, SIGNS_FOLDER, STACKS_FOLDER)
    check_folder(folder, "train.output_dir", files=files, folders=folders)
