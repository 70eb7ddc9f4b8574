"""Whether a run can go on from a checkpoint: what must be the same, and is refused in one line if it is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalibi.checkpoint.manifest import Manifest, read_manifest
from megalibi.config import ON_RESUME, Config, OnResume, config_from_dict, find_changes, learning_rate_at
from megalibi.data.tokens.identity import DataIdentity
from megalibi.errors import ConfigError

_SCHEDULE = ("learning_rate", "min_learning_rate", "warmup_steps", "warmup_init_learning_rate", "decay_steps")


def check_resumable(checkpoint: Path, config: Config, data: DataIdentity, world_size: int) -> Manifest:
    """Check that a run can go on from a checkpoint, without reading its tensors.

    Args:
        checkpoint: Its folder.
        config: The run.
        data: What it would learn from.
        world_size: Ranks of the job.

    Raises:
        ConfigError: It is damaged, holds another model, was trained on other data or in another order, or was written
            by another number of ranks.
    """
    manifest = read_manifest(checkpoint)
    for name, (theirs, ours) in find_changes(_trained_config(manifest), config).items():
        if ON_RESUME[name] is OnResume.FIXED:
            raise ConfigError(
                f"{name}={ours} does not fit the checkpoint {checkpoint}, which has {name}={theirs}: resume with that "
                "value, or start anew in another train.output_dir"
            )
    if manifest.data:
        _check_same_data(checkpoint, manifest, config, data)
    else:  # older than identities
        _check_same_paths(checkpoint, manifest, config)
    if manifest.topology["world_size"] != world_size:
        raise ConfigError(
            f"{checkpoint} was written by {manifest.topology['world_size']} ranks, this run has {world_size}: "
            "resume on as many"
        )
    return manifest


def describe_changes(manifest: Manifest, config: Config, data: DataIdentity) -> Iterator[str]:
    """Yield a line for each thing that is another one than when the checkpoint was written, and may be.

    Args:
        manifest: Of a checkpoint that check_resumable let pass.
        config: The run.
        data: What it learns from.
    """
    trained_config = _trained_config(manifest)
    changes = find_changes(trained_config, config)
    said = [f"{name} {a} -> {b}" for name, (a, b) in changes.items() if ON_RESUME[name] is OnResume.SAID]
    if said:
        yield f"goes on with other values than before: {', '.join(said)}"
    if manifest.data and data.to_dict()["train"] != manifest.data["train"]:
        yield "data.train is not what the checkpoint was trained on: from here on the samples may be other ones"
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
            f"data.train has the weights {weights}, and the checkpoint {checkpoint} was trained with "
            f"{trained_weights}: resume with these, or start anew in another train.output_dir"
        )
    for dataset, identity, trained_identity in zip(config.data.train, ours["train"], trained["train"], strict=True):
        if identity != trained_identity and not config.checkpoint.accept_other_data:
            raise ConfigError(
                f"data.train={dataset.prefix} ({_describe(identity)}) is not what the checkpoint {checkpoint} was "
                f"trained on ({_describe(trained_identity)}): resume with the same token file, wherever it stands, "
                "start anew in another train.output_dir, or, if it was mended, use checkpoint.accept_other_data=true"
            )
    tokenizers = [identity["tokenizer_sha256"] for identity in (trained, ours)]
    if None not in tokenizers and tokenizers[0] != tokenizers[1]:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer} is not that of the checkpoint {checkpoint}: resume with the one "
            "that made the token files, wherever it stands"
        )


def _check_same_paths(checkpoint: Path, manifest: Manifest, config: Config) -> None:
    theirs = _trained_config(manifest).data.train
    if config.data.train != theirs:
        raise ConfigError(
            f"data.train={_name(config.data.train)} does not fit the checkpoint {checkpoint}, which has data.train="
            f"{_name(theirs)}: resume with that value, or start anew in another train.output_dir"
        )


def _name(datasets: Any) -> str:
    return ", ".join(f"{dataset.prefix} (weight {dataset.weight})" for dataset in datasets)


def _describe(identity: dict[str, Any]) -> str:
    return f"{identity['tokens']:,} tokens in {identity['documents']:,} documents, sha256 {identity['bin_sha256'][:12]}"
