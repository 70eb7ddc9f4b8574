"""The files that a comparison writes, and the sentences on what was run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megalibi.config import Config, config_to_dict
from megalibi.files import make_folder, write_aside, write_json
from megalibi.metrics.provenance import describe_run
from megalibi.model import count_parameters
from megalibi.report.plots import save_figure
from megalibi.studies.baselines import describe_sinusoidal
from megalibi.studies.comparison.plan import find_shapes
from megalibi.studies.comparison.report.findings import judge_comparison
from megalibi.studies.comparison.report.page import format_comparison
from megalibi.studies.comparison.report.plot import training_curves
from megalibi.studies.comparison.results import Results
from megalibi.studies.comparison.study import FIGURE_5, CompareStudy
from megalibi.units import format_bytes


def describe_disk(study: CompareStudy, base: Config) -> str:
    """Return how much part two keeps on disk."""
    a_model = -(-base.train.steps // base.checkpoint.every_steps)  # and one at the end
    # fp32 weights and two moments of each, beside the weights that the model computes with.
    a_checkpoint = count_parameters(base.model) * (12 if base.train.precision == "fp32" else 14)
    models = len(study.models())
    return (
        f"Part two keeps all checkpoints of its {models} trainings: {models} x {a_model} x "
        f"{format_bytes(a_checkpoint)} = {format_bytes(models * a_model * a_checkpoint)} on disk."
    )


def describe_comparison(study: CompareStudy, base: Config, *, gpu: str, is_plan: bool, is_rehearsal: bool) -> list[str]:
    """Return sentences on what was run, and where.

    Args:
        study: The section ``study``.
        base: The study's run.
        gpu: The GPU's name; empty: a CPU computed.
        is_plan: Whether nothing was run.
        is_rehearsal: Whether the numbers mean nothing.
    """
    model, batch, micro = base.model, base.train.global_batch_size, base.train.micro_batch_size
    unfused = study.unfused_micro_batch_size or micro
    and_unfused = f" ({unfused * base.data.seq_length:,} with unfused attention, which holds its scores)"
    where = gpu or "a CPU; no GPU has run this, and no number here is of one"
    layers = count_parameters(model) - model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    sentences = [
        f"{count_parameters(model):,} parameters, {layers:,} of them outside the embedding: {model.num_layers} layers, "
        f"{model.hidden_size} wide, {model.num_attention_heads} heads, feed-forward {model.ffn_hidden_size}. At every "
        f"length {batch * base.data.seq_length:,} tokens in an update and {micro * base.data.seq_length:,} in a micro "
        f"batch{and_unfused if unfused != micro else ''}; {base.train.precision}, ZeRO {base.zero.stage}, ranks: "
        f"{study.ranks}. One training of each model (n = 1).",
        describe_sinusoidal(model),
        describe_disk(study, base),
    ]
    if is_plan:
        sentences.append("The plan alone: nothing was run, measured columns are empty.")
    else:
        sentences.append(f"On {where}.")
    if is_rehearsal:
        sentences.append("A rehearsal: these numbers mean nothing.")
    return sentences


def write_comparison(output: Path, base: Config, results: Results, *, facts: Sequence[str], device: str) -> None:
    """Write results.json, report.md and, once there are curves, figure5.png.

    Args:
        output: The folder for them.
        base: The study's run.
        results: What is known of the comparison.
        facts: Sentences on what was run, and where.
        device: The device that computed, cuda or cpu.

    Raises:
        FileError: A file cannot be written.
    """
    record = {
        **describe_run(device, ("torch", "deepspeed")),
        "config": config_to_dict(base),
        "shapes": find_shapes(base),
        **results.to_json(),
        "findings": [asdict(finding) for finding in judge_comparison(results)],
    }
    make_folder(output)
    write_json(record, output / "results.json")
    picture = FIGURE_5 if results.has_curves else None
    if picture:
        save_figure(training_curves(results), output / picture)
    write_aside(output / "report.md", format_comparison(results, facts=facts, picture=picture))
