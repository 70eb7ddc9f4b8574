"""Whether a run can go on from a checkpoint: what must be the same, and is refused in one line if it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalibi.checkpoint.manifest import Manifest, read_manifest
from megalibi.config import Config, ConfigError, config_from_dict, config_to_dict
from megalibi.data.identity import DataIdentity
from megalibi.log import get_logger

_LOGGER = get_logger(__name__)


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
    # Through a Config: a checkpoint that is older than a field has the field's default.
    trained_config = config_from_dict(manifest.config)
    ours, theirs = config_to_dict(config), config_to_dict(trained_config)
    fixed = {
        "model": [name for name in ours["model"] if not name.endswith(("dropout", "attention_backend", "recompute"))],
        "data": ["seq_length"] if manifest.data else ["train", "seq_length"],
        "train": ["global_batch_size", "seed", "precision"],
        "parallel": ["tensor_parallel_size"],
        "zero": ["stage"],
        # DeepSpeed and torch take these from the checkpoint: a changed value would be ignored without a word.
        "optimizer": ["kind", "weight_decay", "beta1", "beta2", "epsilon", "momentum", "clip_grad_norm"],
    }
    for section, names in fixed.items():
        for name in names:
            value, their_value = ours[section][name], theirs[section][name]
            if value != their_value:
                raise ConfigError(
                    f"{section}.{name}={value} does not fit the checkpoint {checkpoint}, which has "
                    f"{section}.{name}={their_value}: resume with that value, or start anew in another train.output_dir"
                )
    if manifest.data:
        _check_same_data(checkpoint, manifest.data, trained_config, config, data)
    if manifest.topology["world_size"] != world_size:
        raise ConfigError(
            f"{checkpoint} was written by {manifest.topology['world_size']} ranks, this run has {world_size}: "
            "resume on as many"
        )
    return manifest


def _check_same_data(
    checkpoint: Path, trained: dict[str, Any], trained_config: Config, config: Config, data: DataIdentity
) -> None:
    """Refuse to go on with other data; the same data may have moved."""
    weights, trained_weights = ([d.weight for d in c.data.train] for c in (config, trained_config))
    if weights != trained_weights:
        raise ConfigError(
            f"data.train has the weights {weights}, and the checkpoint {checkpoint} was trained with "
            f"{trained_weights}: resume with these, or start anew in another train.output_dir"
        )
    ours = data.to_dict()
    for dataset, identity, trained_identity in zip(config.data.train, ours["train"], trained["train"], strict=True):
        if identity != trained_identity:
            raise ConfigError(
                f"data.train={dataset.prefix} ({_describe(identity)}) is not what the checkpoint {checkpoint} was "
                f"trained on ({_describe(trained_identity)}): resume with the same token file, wherever it stands, or "
                "start anew in another train.output_dir"
            )
    if ours["valid"] != trained["valid"]:
        _LOGGER.warning("data.valid is not that of the checkpoint: validation losses before and after do not compare")


def _describe(identity: dict[str, Any]) -> str:
    return f"{identity['tokens']:,} tokens in {identity['documents']:,} documents, sha256 {identity['bin_sha256'][:12]}"
