"""Going on from a checkpoint: what must be the same, and is refused in one line if it is not, and loading the state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from megalibi.checkpoint.checkpoint import Checkpoint
from megalibi.checkpoint.folder import LATEST
from megalibi.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from megalibi.checkpoint.tensors.saved_state import RankSlice
from megalibi.checkpoint.tensors.state_file import WEIGHT
from megalibi.config import ON_RESUME, Config, OnResume, config_from_dict, find_changes, learning_rate_at
from megalibi.config.sample_ranges import SampleRanges
from megalibi.data.tokens.identity import DataIdentity
from megalibi.engine.masters import find_masters, hand_out_weights, write_progress
from megalibi.errors import CheckpointError, ConfigError
from megalibi.metrics.records import RollbackRecord
from megalibi.parallel import ProcessGroups, get_shard_spec, refusing_together

IMPORTED_DATA = "none-imported-from-other-software"
"""What data.train and train.output_dir are in a checkpoint of weights that were imported for no run."""
_SCHEDULE = ("learning_rate", "min_learning_rate", "warmup_steps", "warmup_init_learning_rate", "decay_steps")


def check_resumable(checkpoint: Path, config: Config, data: DataIdentity) -> Manifest:
    """Check that a run can go on from a checkpoint, without reading its tensors.

    Args:
        checkpoint: The folder of its step.
        config: The run's configuration.
        data: The identity of the run's text.

    Returns:
        The checkpoint's manifest.

    Raises:
        CheckpointError: The folder is no checkpoint, or its manifest is damaged.
        ConfigError: It holds another model, or was trained on other data or in another order.
        FileError: Its manifest may not be read.
    """
    manifest = read_manifest(checkpoint)
    for refusal in find_refusals(checkpoint, manifest, config):
        raise ConfigError(f"{refusal}; resume with it, or start anew in another train.output_dir")
    if manifest.data:
        _check_same_data(checkpoint, manifest, config, data)
    else:  # older than identities
        _check_same_paths(checkpoint, manifest, config)
    return manifest


def find_refusals(checkpoint: Path, manifest: Manifest, config: Config) -> Iterator[str]:
    """Yield a line for each field with whose value a run cannot go on from a checkpoint; its data is not compared.

    Args:
        checkpoint: The folder of its step.
        manifest: Its manifest.
        config: The run's configuration.
    """
    trained = _trained_config(manifest)
    if trained.data.train[0].prefix == IMPORTED_DATA:
        yield (
            f"checkpoint.resume={checkpoint}: must be a checkpoint that was imported for this run, by megalibi convert "
            "from-hf IN OUT --config FILE, and this one was for none"
        )
        return
    for name, (theirs, ours) in find_changes(trained, config).items():
        if ON_RESUME[name] is OnResume.FIXED:
            yield f"{name}={ours}: must be {theirs}, the value in the checkpoint {checkpoint}"
    left_out, left_out_then = (find_left_out(c, manifest.rollbacks) for c in (config, trained))
    consumed = manifest.samples_consumed
    reached = left_out_then.number_at(consumed - 1) + 1 if consumed else 0
    if left_out.below(reached) != left_out_then.below(reached):
        yield (
            f"data.skip={left_out}: must leave out {left_out_then.below(reached)} of the samples before {reached}, "
            f"which the checkpoint {checkpoint} has behind it"
        )


def find_left_out(config: Config, rollbacks: Iterable[RollbackRecord] = ()) -> SampleRanges:
    """Return the numbers of the samples of data.train that a run leaves out.

    Args:
        config: The run's configuration.
        rollbacks: The loss spikes that took the run back.
    """
    texts = (text for record in rollbacks for text in record.left_out.split(","))
    return SampleRanges.parse([*config.data.skip, *texts])


def find_said_changes(manifest: Manifest, config: Config) -> list[str]:
    """Return what differs from when the checkpoint was written and changes the losses: ``zero.stage 1 -> 3``.

    Args:
        manifest: The manifest of the checkpoint.
        config: The run's configuration.
    """
    changes = find_changes(_trained_config(manifest), config)
    return [f"{name} {a} -> {b}" for name, (a, b) in changes.items() if ON_RESUME[name] is OnResume.SAID]


def describe_changes(manifest: Manifest, config: Config, data: DataIdentity, world_size: int) -> Iterator[str]:
    """Yield a line for each thing that differs from when the checkpoint was written, and is allowed to.

    Args:
        manifest: The manifest of a checkpoint that check_resumable let pass.
        config: The run's configuration.
        data: The identity of the run's text.
        world_size: The number of ranks of the job.
    """
    trained_config = _trained_config(manifest)
    said = find_said_changes(manifest, config)
    trained_size = manifest.topology["world_size"]
    if trained_size != world_size:
        said.insert(0, f"ranks {trained_size} -> {world_size}")
    if said:
        yield f"goes on with other values than before: {', '.join(said)}"
    if manifest.data and data.to_dict()["train"] != manifest.data["train"]:
        yield "data.train is not what the checkpoint was trained on: from here on the samples may be different ones"
    if manifest.data and data.to_dict()["valid"] != manifest.data["valid"]:
        yield "data.valid is not that of the checkpoint: validation losses before and after do not compare"
    step = manifest.step
    rates = [learning_rate_at(step, c.optimizer, c.train.steps) for c in (trained_config, config)]
    if step and rates[0] != rates[1]:
        last = learning_rate_at(step - 1, trained_config.optimizer, trained_config.train.steps)
        yield (
            f"the learning rate was {last:.3g} in step {step} and is {rates[1]:.3g} in step {step + 1}, where the "
            f"checkpoint's schedule has {rates[0]:.3g}: {_keep_schedule(trained_config, config)} keeps that schedule"
        )


def load_checkpoint(engine: DeepSpeedEngine, checkpoint: Path, groups: ProcessGroups) -> Manifest:
    """Load weights, optimizer and loss scale; every rank must call it. Every file is verified first.

    The checkpoint may be of any topology: each rank reads what its own part of the optimizer steps on.

    Args:
        engine: The engine that build_engine returned for a configuration that check_resumable let pass.
        checkpoint: The folder of its step.
        groups: The groups of this process.

    Returns:
        The checkpoint's manifest.

    Raises:
        CheckpointError: On every rank, with the same line: a file is missing, damaged or would run code, and is named;
            or hosts have different checkpoints in the folder.
        FileError: On every rank: a file may not be read.
    """
    advice = f"; to resume from another checkpoint write its name into {LATEST}"
    with refusing_together(groups.world, checkpoint, advice):
        opened = Checkpoint(checkpoint, read_manifest(checkpoint))
    opened.verify(groups.world, advice)
    with refusing_together(groups.world, checkpoint, advice):
        _fill_masters(engine, opened, groups)
    hand_out_weights(engine)
    engine.global_steps = opened.manifest.step  # which its log lines count
    return opened.manifest


def _fill_masters(engine: DeepSpeedEngine, opened: Checkpoint, groups: ProcessGroups) -> None:
    """Give this rank's optimizer what it steps on."""
    opened.check_parameters(engine.module)
    optimizer = opened.config.optimizer.kind
    if opened.manifest.optimizer.get("kind", optimizer) != optimizer:
        raise CheckpointError(f"{opened.path / MANIFEST} has another optimizer than its configuration, {optimizer}")
    saved = opened.read_state()
    specs = {name: get_shard_spec(parameter) for name, parameter in engine.module.named_parameters()}
    for master in find_masters(engine, optimizer):
        cut = RankSlice(specs[master.name], groups.tensor.rank, groups.tensor.size)
        last = master.start + len(master.weight)
        for kind, values in {WEIGHT: master.weight, **master.states}.items():
            values.copy_(saved.read_stretch(master.name, kind, master.start, last, cut))
    write_progress(engine, saved.read_progress())


def _trained_config(manifest: Manifest) -> Config:
    """Return the checkpoint's configuration; one that is older than a field has the field's default."""
    return config_from_dict(manifest.config)


def _keep_schedule(trained: Config, config: Config) -> str:
    """Return the overrides that give a run the learning rates of the one before."""
    values = {name: getattr(trained.optimizer, name) for name in _SCHEDULE}
    values["decay_steps"] = values["decay_steps"] or trained.train.steps
    return " ".join(
        f"optimizer.{name}={value}" for name, value in values.items() if value != getattr(config.optimizer, name)
    )


def _check_same_data(checkpoint: Path, manifest: Manifest, config: Config, data: DataIdentity) -> None:
    """Refuse to go on with other data; the same data may have moved."""
    trained_config, trained, ours = _trained_config(manifest), manifest.data, data.to_dict()
    weights, trained_weights = ([d.weight for d in c.data.train] for c in (config, trained_config))
    if weights != trained_weights:
        raise ConfigError(
            f"data.train has the weights {weights}: must be {trained_weights}, those in the checkpoint {checkpoint}; "
            "resume with them, or start anew in another train.output_dir"
        )
    for dataset, identity, trained_identity in zip(config.data.train, ours["train"], trained["train"], strict=True):
        if identity != trained_identity and not config.checkpoint.accept_other_data:
            raise ConfigError(
                f"data.train={dataset.prefix} ({_describe(identity)}): must be the text that the checkpoint "
                f"{checkpoint} was trained on ({_describe(trained_identity)}); resume with the same token file, "
                "wherever it stands, start anew in another train.output_dir, or, if it was mended, use "
                "checkpoint.accept_other_data=true"
            )
    tokenizers = [identity["tokenizer_sha256"] for identity in (trained, ours)]
    if None not in tokenizers and tokenizers[0] != tokenizers[1]:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer}: must be the tokenizer of the checkpoint {checkpoint}; resume "
            "with the one that made the token files, wherever it stands"
        )


def _check_same_paths(checkpoint: Path, manifest: Manifest, config: Config) -> None:
    theirs = _trained_config(manifest).data.train
    if config.data.train != theirs:
        raise ConfigError(
            f"data.train={_name(config.data.train)}: must be {_name(theirs)}, the value in the checkpoint "
            f"{checkpoint}; resume with it, or start anew in another train.output_dir"
        )


def _name(datasets: Any) -> str:
    return ", ".join(f"{dataset.prefix} (weight {dataset.weight})" for dataset in datasets)


def _describe(identity: dict[str, Any]) -> str:
    return f"{identity['tokens']:,} tokens in {identity['documents']:,} documents, sha256 {identity['bin_sha256'][:12]}"
