"""The model card, README.md: how the model was trained and how it is loaded, from what the checkpoint says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megalibi.checkpoint import CHECKPOINTS, Checkpoint, read_manifest
from megalibi.config import config_to_dict
from megalibi.export.certificate import Certificate
from megalibi.export.hf.plan import HfPlan
from megalibi.metrics.records import METRICS_FILE, StepRecord, ValidationRecord, read_records_of_step


def make_card(checkpoint: Checkpoint, plan: HfPlan, certificate: Certificate) -> str:
    """Return the text of README.md.

    Args:
        checkpoint: What was exported.
        plan: As what.
        certificate: What came out.
    """
    manifest, config = checkpoint.manifest, checkpoint.config
    tokens = manifest.samples_consumed * config.data.seq_length
    facts = {
        "architecture": f"{plan.known.architecture} of transformers, weights in {plan.dtype}",
        "training steps": f"{manifest.step:,}",
        "training tokens": f"{tokens:,}",
        "training length": f"{config.data.seq_length:,} tokens",
        **_describe_cap(plan),
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
        f"certificate.json has the checksum of every tensor before and after the conversion. {_describe(certificate)}",
        *(f"\n{note}" for note in certificate.notes),
        "",
        "The configuration of the run, of paths the last part alone:",
        "",
        "```yaml",
        yaml.safe_dump(_shorten_paths(config_to_dict(config)), sort_keys=False).rstrip(),
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


def _describe_cap(plan: HfPlan) -> dict[str, str]:
    """MPT's class fails past the length that its config.json has; the others have no cap."""
    if plan.known.name != "mpt":
        return {}
    return {"longest text": f"{plan.max_length:,} tokens, max_seq_len of config.json, which may be raised"}


def _describe(certificate: Certificate) -> str:
    """Return how far both are apart, or that it is not known, in a sentence."""
    if (comparison := certificate.comparison) is None:
        return f"The logits of both were not compared: {certificate.not_compared}."
    return (
        f"At {comparison.tokens:,} tokens the logits of both are within {comparison.largest_logit_difference:.1e} "
        f"({comparison.software}), and the perplexity is {comparison.source_perplexity:.6g} before and "
        f"{comparison.target_perplexity:.6g} after."
    )


def _shorten_paths(fields: Any) -> Any:
    """Return a configuration with the last part alone of every text that is a path: a card is read by everybody."""
    if isinstance(fields, dict):
        return {name: _shorten_paths(value) for name, value in fields.items()}
    if isinstance(fields, list | tuple):
        return [_shorten_paths(value) for value in fields]
    return Path(fields).name if isinstance(fields, str) and "/" in fields else fields


def _describe_data(data: dict[str, Any]) -> Iterator[str]:
    for file in data.get("train", []):
        yield f"{file['tokens']:,} tokens in {file['documents']:,} documents, sha256 {file['bin_sha256'][:12]}"
