"""Where a run begins: anew, from its own latest checkpoint, or from another run's; and that it holds its folder."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megalibi.checkpoint import (
    LATEST,
    MANIFEST,
    Manifest,
    RunLock,
    check_resumable,
    describe_changes,
    find_checkpoint,
    list_checkpoints,
    read_manifest,
)
from megalibi.config import Config
from megalibi.errors import CheckpointError, ConfigError
from megalibi.log import get_logger
from megalibi.metrics.records import INFO_FILE, METRICS_FILE, StepRecord, ValidationRecord, read_records_of_step
from megalibi.parallel import gather_objects, refusing_together
from megalibi.train.job import Job, checkpoints_folder, validation_is_due

_LOGGER = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins, the same on every rank."""

    run_id: str
    """The identity of the run, which its checkpoints carry."""
    checkpoint: Path | None
    """The checkpoint from which the run begins; None if it begins anew."""
    validation_is_missing: bool = False
    """Whether the run stopped after the checkpoint's step and before the validation that was due there."""


def find_resume(config: Config) -> Path | None:
    """Return the checkpoint that ``checkpoint.resume`` means; None: the run starts anew.

    A path is where a run begins that has no checkpoints of its own yet: the same command, started again by a scheduler,
    goes on instead of beginning there for ever.

    Raises:
        CheckpointError: The folder's own checkpoint was written by another run.
        ConfigError: checkpoint.resume does not fit what the folder holds.
    """
    folder, resume = checkpoints_folder(config), config.checkpoint.resume
    if (Path(config.train.output_dir) / MANIFEST).is_file():
        raise ConfigError(
            f"train.output_dir={config.train.output_dir}: must be the folder of a run, and is a checkpoint; to go on "
            f"from it use checkpoint.resume={config.train.output_dir} with another train.output_dir"
        )
    own = find_checkpoint(folder)
    if resume == "none" and own is not None:
        raise ConfigError(
            f"checkpoint.resume=none: must be auto, since {own} exists; or give another train.output_dir to start anew"
        )
    if own is None:
        return None if resume in ("auto", "none") else Path(resume)
    if Path(resume).resolve().parent == folder.resolve():
        raise ConfigError(
            f"checkpoint.resume={resume}: must be auto or a checkpoint of another run; to go back to this one, write "
            f"its name into {folder / LATEST} and use checkpoint.resume=auto"
        )
    theirs, ours = read_manifest(own).run_id, _read_run_id(config)
    if not ours:  # run_info.json is gone: the other checkpoints know it
        others = {read_manifest(path).run_id for path in list_checkpoints(folder)} - {theirs, ""}
        ours = min(others, default="")
    if theirs and ours and theirs != ours:
        raise CheckpointError(
            f"{own} was written by another run (run_id {theirs}, this folder's is {ours}): to begin from it, use "
            f"checkpoint.resume=PATH with a new train.output_dir; to go on here, move it out of {folder}"
        )
    return own


@contextlib.contextmanager
def hold_run(job: Job) -> Iterator[Start]:
    """Take the run's folder for this run alone, and say where it begins; every rank calls it.

    File systems may show ranks different things, so rank 0 decides.

    Raises:
        UserError: On every rank, if another run writes into the folder, or it cannot be written.
    """
    folder = Path(job.config.train.output_dir)
    with contextlib.ExitStack() as held:
        start = None
        with refusing_together(job.groups.world, folder):
            if job.groups.world.rank == 0:
                held.enter_context(RunLock(folder))
                start = _begin(job)
        (start,) = gather_objects(start, job.groups.world)[:1]
        assert start is not None
        yield start


def _begin(job: Job) -> Start:
    """Find out where the run begins, and log what has changed since."""
    config = job.config
    checkpoint = find_resume(config)
    if checkpoint is None:
        return Start(run_id=_read_run_id(config) or uuid.uuid4().hex, checkpoint=None)
    # Once more: another run may have ended here since check_run.
    manifest = check_resumable(checkpoint, config, job.data.identity)
    for line in describe_changes(manifest, config, job.data.identity, job.groups.world.size):
        _LOGGER.warning("%s", line)
    if checkpoint.parent != checkpoints_folder(config):  # another run's
        return Start(run_id=_read_run_id(config) or uuid.uuid4().hex, checkpoint=checkpoint)
    _warn_of_later(checkpoint)
    return Start(
        run_id=_read_run_id(config) or manifest.run_id or uuid.uuid4().hex,
        checkpoint=checkpoint,
        validation_is_missing=_lacks_validation(job, manifest),
    )


def _warn_of_later(checkpoint: Path) -> None:
    """Log which checkpoints a run that goes back leaves behind."""
    complete = list_checkpoints(checkpoint.parent)
    later = [path.name for path in complete[complete.index(checkpoint) + 1 :]]
    if later:
        _LOGGER.warning(
            "goes back to %s: %s will be deleted or written over after the next save; move them to keep them",
            checkpoint.name,
            ", ".join(later),
        )


def _lacks_validation(job: Job, manifest: Manifest) -> bool:
    """Return whether metrics.jsonl has the checkpoint's step and lacks the validation that was due after it."""
    if job.data.valid is None or not validation_is_due(job.config, manifest.step):
        return False
    path = Path(job.config.train.output_dir) / METRICS_FILE
    kinds = {type(record) for record in read_records_of_step(path, manifest.step)}
    return StepRecord in kinds and ValidationRecord not in kinds


def _read_run_id(config: Config) -> str:
    """Return the identity that run_info.json has; empty if there is none, as in a folder of an earlier version."""
    try:
        info = json.loads((Path(config.train.output_dir) / INFO_FILE).read_bytes())
    except (OSError, ValueError):
        return ""
    return str(info.get("run_id", "")) if isinstance(info, dict) else ""
