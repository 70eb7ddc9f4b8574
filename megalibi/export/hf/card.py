"""The model card, README.md: how the model was trained and how it is loaded, from what the checkpoint says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from megalibi.checkpoint import CHECKPOINTS, Checkpoint, read_manifest
from megalibi.config import config_to_dict
from megalibi.export.hf.formats import HfFormat
from megalibi.metrics.records import METRICS_FILE, StepRecord, ValidationRecord, read_records_of_step


def make_card(checkpoint: Checkpoint, known: HfFormat, dtype: str, notes: Sequence[str]) -> str:
    """Return the text of README.md.

    Args:
        checkpoint: What was exported.
        known: As what.
        dtype: The type of the weights there, as PyTorch names it.
        notes: What a user should know besides, a sentence each.
    """
    manifest, config = checkpoint.manifest, checkpoint.config
    tokens = manifest.samples_consumed * config.data.seq_length
    facts = {
        "architecture": f"{known.architecture} of transformers, weights in {dtype}",
        "training steps": f"{manifest.step:,}",
        "training tokens": f"{tokens:,}",
        "training length": f"{config.data.seq_length:,} tokens; ALiBi has no length cap",
        "training data": "; ".join(_describe_data(manifest.data)) or "unknown",
        **{f"last {name}": f"{value:.4f}" for name, value in find_last_losses(checkpoint.path).items()},
        "trained by": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "run": manifest.run_id or "unknown",
    }
    return "\n".join([
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [alibi, megalibi]",
        "---",
        "",
        f"# A GPT with ALiBi, step {manifest.step:,}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
        "It loads without remote code:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH OF THIS FOLDER")',
        "```",
        "",
        "certificate.json has the checksum of every tensor before and after the conversion, the slopes of both sides,",
        "and how far the logits of both are apart.",
        *(f"\n{note}" for note in notes),
        "",
        "The configuration of the run:",
        "",
        "```yaml",
        yaml.safe_dump(config_to_dict(config), sort_keys=False).rstrip(),
        "```",
        "",
    ])  # fmt: skip


def find_last_losses(checkpoint: Path) -> dict[str, float]:
    """Return the losses of the step at which a checkpoint was written; nothing if the run's folder is not at hand.

    Args:
        checkpoint: The folder of a step, in the ``checkpoints`` of its run.
    """
    if checkpoint.parent.name != CHECKPOINTS:
        return {}
    found = {}
    for record in read_records_of_step(checkpoint.parent.parent / METRICS_FILE, read_manifest(checkpoint).step):
        if isinstance(record, StepRecord):
            found["training loss"] = record.loss
        elif isinstance(record, ValidationRecord):
            found["validation loss"] = record.validation_loss
    return found


def _describe_data(data: dict[str, Any]) -> Iterator[str]:
    for file in data.get("train", []):
        yield f"{file['tokens']:,} tokens in {file['documents']:,} documents, sha256 {file['bin_sha256'][:12]}"
