"""What a run is before its first step: its data, what it goes on from, what all ranks agree on, and who it is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

import megalibi
from megalibi.checkpoint import (
    CHECKPOINTS,
    LATEST,
    RunLock,
    check_resumable,
    describe_changes,
    find_checkpoint,
    list_checkpoints,
    read_manifest,
)
from megalibi.config import BY_CONTENT, Config, DatasetConfig, Derived, derive, flatten_config, save_config
from megalibi.data.dataset import Dataset, open_dataset
from megalibi.data.loader import Loader
from megalibi.data.provenance import identify_data, say_unrecorded
from megalibi.data.tokenizer.tokenizer import load_tokenizer
from megalibi.data.tokens.identity import DataIdentity
from megalibi.errors import ConfigError
from megalibi.files import write_aside
from megalibi.log import get_logger
from megalibi.metrics.outputs import check_run_folder
from megalibi.metrics.provenance import describe_origin
from megalibi.metrics.records import (
    CONFIG_FILE,
    INFO_FILE,
    METRICS_FILE,
    StepRecord,
    ValidationRecord,
    read_records_of_step,
)
from megalibi.model import count_parameters
from megalibi.parallel import ProcessGroups, gather_objects, refusing_together

_LOGGER = get_logger(__name__)
_PACKAGES = ("torch", "deepspeed", "numpy", "triton", "flash-attn")
"""Those that decide what is computed; ranks must have the same versions."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run learns from, opened and checked once."""

    train: Dataset
    """data.train."""
    valid: Dataset | None
    """data.valid."""
    identity: DataIdentity
    """What tells it from other data."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What stays the same from the first step to the last."""

    config: Config
    """The run."""
    derived: Derived
    """What follows from it on this world."""
    data: RunData
    """What it learns from."""
    groups: ProcessGroups
    """Of this process."""
    device: torch.device
    """Where this rank computes."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins, the same on every rank."""

    run_id: str
    """Of the run; its checkpoints carry it."""
    checkpoint: Path | None
    """What it goes on from; None: it starts anew."""
    validation_is_missing: bool = False
    """The run stopped after the checkpoint's step and before the validation that was due there."""


def check_run(config: Config, world_size: int) -> tuple[Derived, RunData]:
    """Find everything that is wrong with a run before anything is allocated.

    Returns:
        What follows from the configuration, and its data.

    Raises:
        ConfigError: With the field, its value and what is allowed.
    """
    derived = derive(config, world_size)
    check_run_folder(Path(config.train.output_dir), "train.output_dir", folders=(CHECKPOINTS,))
    train = open_split(config, config.data.train)
    valid = open_split(config, config.data.valid) if config.data.valid else None
    tokenizer = None if config.data.tokenizer is None else load_tokenizer(config.data.tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is below the {tokenizer.vocab_size} ids of data.tokenizer="
            f"{config.data.tokenizer}: at least {tokenizer.vocab_size} is allowed"
        )
    identity = identify_data(train.token_files, valid.token_files if valid else [], tokenizer)
    checkpoint = find_resume(config)
    if checkpoint is not None:
        check_resumable(checkpoint, config, identity, world_size)
    return derived, RunData(train=train, valid=valid, identity=identity)


def open_split(config: Config, split: tuple[DatasetConfig, ...]) -> Dataset:
    """Open the token files of data.train or data.valid."""
    return open_dataset(
        [(dataset.prefix, dataset.weight) for dataset in split],
        seq_length=config.data.seq_length,
        seed=config.train.seed,
        vocab_size=config.model.vocab_size,
    )


def open_loader(job: Job) -> Loader:
    """Return what reads this rank's batches of data.train."""
    config, groups = job.config, job.groups
    return Loader(
        job.data.train,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_rank=groups.data.rank,
        data_size=groups.data.size,
        document_mask=config.data.document_mask,
    )


def checkpoints_folder(config: Config) -> Path:
    """Return the run's folder of checkpoints."""
    return Path(config.train.output_dir) / CHECKPOINTS


def find_resume(config: Config) -> Path | None:
    """Return the checkpoint that ``checkpoint.resume`` means; None: the run starts anew.

    A path is where a run begins that has no checkpoints of its own yet: the same command, started again by a scheduler,
    goes on instead of beginning there for ever.

    Raises:
        ConfigError: It cannot be used, or another run wrote it.
    """
    folder, resume = checkpoints_folder(config), config.checkpoint.resume
    own = find_checkpoint(folder)
    if resume == "none" and own is not None:
        raise ConfigError(
            f"checkpoint.resume=none, but {own} exists: use checkpoint.resume=auto or another train.output_dir"
        )
    if own is None:
        return None if resume in ("auto", "none") else Path(resume)
    if Path(resume).resolve().parent == folder.resolve():
        raise ConfigError(
            f"checkpoint.resume={resume} is of this run itself: to go back to it, write its name into "
            f"{folder / LATEST} and use checkpoint.resume=auto"
        )
    theirs, ours = read_manifest(own).run_id, _read_run_id(config)
    if not ours:  # run_info.json is gone: the other checkpoints know it
        others = {read_manifest(path).run_id for path in list_checkpoints(folder)} - {theirs, ""}
        ours = min(others, default="")
    if theirs and ours and theirs != ours:
        raise ConfigError(
            f"{own} was written by another run (run_id {theirs}, this folder's is {ours}): to begin from it, use "
            f"checkpoint.resume=PATH with a new train.output_dir; to go on here, move it out of {folder}"
        )
    return own


def _read_run_id(config: Config) -> str:
    """Return the identity that run_info.json has; empty if there is none, as in a folder of an earlier version."""
    try:
        info = json.loads((Path(config.train.output_dir) / INFO_FILE).read_bytes())
    except (OSError, ValueError):
        return ""
    return str(info.get("run_id", "")) if isinstance(info, dict) else ""


def describe_facts(config: Config, data: DataIdentity) -> dict[str, str]:
    """Return what all ranks must have in common: code, versions, configuration and data, by name."""
    facts = {"the version of megalibi": megalibi.__version__, "the code of megalibi": f"sha256 {_hash_code()[:12]}"}
    facts["the version of python"] = ".".join(platform.python_version_tuple()[:2])
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            facts[f"the version of {package}"] = version(package)
    # Files are known by what they hold: a host may have them elsewhere.
    facts |= {name: str(value) for name, value in flatten_config(config).items() if name not in BY_CONTENT}
    for name, split, identities in (
        ("data.train", config.data.train, data.train),
        ("data.valid", config.data.valid, data.valid),
    ):
        facts[f"the number of token files of {name}"] = str(len(split))
        for number, (dataset, identity) in enumerate(zip(split, identities, strict=True)):
            facts[f"{name}[{number}]"] = (
                f"of weight {dataset.weight}, {identity.tokens:,} tokens in {identity.documents:,} documents, "
                f"sha256 of .idx {identity.idx_sha256[:12]}, of .bin {identity.bin_sha256[:12]}"
            )
    facts["the tokenizer's sha256"] = str(data.tokenizer_sha256)
    return facts


@cache
def _hash_code() -> str:
    """Return a checksum of the sources of both packages: hosts may have other checkouts of one version."""
    digest = hashlib.sha256()
    for package in ("megalibi", "alibi_attention"):
        folder = Path(str(find_spec(package).origin)).parent  # type: ignore[union-attr]
        for path in sorted(path for pattern in ("*.py", "*.cpp", "*.h") for path in folder.rglob(pattern)):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def hold_run(job: Job) -> Iterator[Start]:
    """Take the run's folder for this run alone, and say where it begins; every rank calls it.

    File systems may show ranks different things: rank 0 decides.

    Raises:
        ConfigError: On every rank: another run writes into the folder, or it cannot be written.
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
    """Find out where the run begins, and say what has changed."""
    config, folder = job.config, Path(job.config.train.output_dir)
    checkpoint = find_resume(config)
    own = checkpoint is not None and checkpoint.parent == checkpoints_folder(config)
    manifest = None
    if checkpoint is not None:  # once more: another run may have ended here since check_run
        manifest = check_resumable(checkpoint, config, job.data.identity, job.groups.world.size)
    run_id = _read_run_id(config) or (manifest.run_id if manifest and own else "") or uuid.uuid4().hex
    missing = False
    if checkpoint is not None and manifest is not None:
        for line in describe_changes(manifest, config, job.data.identity):
            _LOGGER.warning("%s", line)
        if own:
            missing = job.data.valid is not None and validation_is_due(config, manifest.step)
            missing = missing and _lacks_validation(folder, manifest.step)
            complete = list_checkpoints(checkpoint.parent)
            later = [path.name for path in complete[complete.index(checkpoint) + 1 :]]
            if later:
                _LOGGER.warning(
                    "goes back to %s: %s will be deleted or written over after the next save; move them to keep them",
                    checkpoint.name,
                    ", ".join(later),
                )
    return Start(run_id=run_id, checkpoint=checkpoint, validation_is_missing=missing)


def validation_is_due(config: Config, step: int) -> bool:
    """Return whether a validation follows a step, in a run that has data.valid."""
    return step == config.train.steps or is_due(step, config.train.eval_every_steps)


def is_due(step: int, every_steps: int) -> bool:
    """Return whether something that happens every so many steps happens after this one; 0: never."""
    return every_steps > 0 and step % every_steps == 0


def _lacks_validation(folder: Path, step: int) -> bool:
    """Return whether metrics.jsonl has a step and no validation after it."""
    kinds = {type(record) for record in read_records_of_step(folder / METRICS_FILE, step)}
    return StepRecord in kinds and ValidationRecord not in kinds


def describe_run(job: Job, start: Start) -> None:
    """Write config.yaml and run_info.json, and say what begins. Rank 0 calls it, when the engine is loaded."""
    config, groups, device = job.config, job.groups, job.device
    folder = Path(config.train.output_dir)
    save_config(config, folder / CONFIG_FILE)
    parameters = count_parameters(config.model)
    info = {
        "run_id": start.run_id,
        "num_parameters": parameters,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "host": socket.gethostname(),
        "deterministic": config.train.deterministic,
        "ranks": f"{groups.world.size}: tensor {groups.tensor.size} x data {groups.data.size}",
        "megalibi": megalibi.__version__,
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
        **describe_origin(),
    }
    write_aside(folder / INFO_FILE, json.dumps(info, indent=1) + "\n")
    say_unrecorded(dataset.prefix for dataset in (*config.data.train, *config.data.valid))
    _LOGGER.info(
        "%s parameters on %d ranks (tensor %d x data %d, ZeRO %d, %s), %s tokens per step, %s",
        f"{parameters:,}",
        groups.world.size,
        groups.tensor.size,
        groups.data.size,
        config.zero.stage,
        config.train.precision,
        f"{job.derived.batch_tokens:,}",
        f"resumed from {start.checkpoint}" if start.checkpoint else "from the start",
    )
