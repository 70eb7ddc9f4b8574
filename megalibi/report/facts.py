"""What a report says about a run, as labelled facts: the results, the set-up and the environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megalibi.metrics.summary import Quartiles, summarize
from megalibi.report.run import Run
from megalibi.units import format_bytes, format_count, format_duration

_POSITION_NAMES = {"alibi": "ALiBi", "sinusoidal": "sinusoidal"}
_PARAMETER_KEYS = ("num_parameters", "parameters")


@dataclass(frozen=True)
class Fact:
    """One row of a table of facts."""

    group: str
    """Name of the group; the rows of a group stand together."""
    label: str
    """The name of the fact, as the page shows it."""
    value: str
    """Value of the fact for one run."""
    note: str = ""
    """Remark in small print after the value: a spread, a unit, or where it was measured."""


def describe_model(run: Run) -> str:
    """Return one sentence on what a run trains."""
    if not run.config:
        return "A run without config.yaml."
    model, data, train = (_section(run, name) for name in ("model", "data", "train"))
    parameters = _num_parameters(run)
    size = f" of {format_count(parameters)} parameters" if parameters is not None else ""
    method = model.get("position_method", "")
    positions = f" with {_POSITION_NAMES.get(method, method)} positions" if method else ""
    shape = ", ".join(
        f"{model[key]:,} {words}"
        for key, words in (("num_layers", "layers"), ("hidden_size", "wide"), ("num_attention_heads", "heads"))
        if key in model
    )
    sentence = f"A GPT{size}{positions}: {shape}"
    if "seq_length" in data:
        sentence += f"; trained at {data['seq_length']:,} tokens"
    if "precision" in train:
        sentence += f" in {train['precision']}"
    return f"{sentence}."


def result_facts(run: Run) -> list[Fact]:
    """Return the numbers that one quotes of a run; none if no step is recorded."""
    summary = summarize(run.metrics)
    if summary is None:
        return []
    planned = _section(run, "train").get("steps")
    of_planned = f"of {planned:,}" if isinstance(planned, int) and planned != summary.steps else ""
    steps_word = "step" if summary.loss_steps == 1 else f"{summary.loss_steps} steps"
    facts = [Fact("loss", "Training loss", f"{summary.loss:.4f}", f"mean of the last {steps_word}")]
    if summary.validation is not None:
        where = f"{format_count(summary.validation.validation_tokens)} tokens, at step {summary.validation.step:,}"
        facts += [
            Fact("loss", "Validation loss", f"{summary.validation.validation_loss:.4f}", where),
            Fact("loss", "Validation perplexity", f"{summary.validation.validation_perplexity:.2f}"),
        ]
    facts += [
        Fact("length", "Steps", f"{summary.steps:,}", of_planned),
        Fact("length", "Training tokens", format_count(summary.tokens)),
        Fact("length", "Time in steps", format_duration(summary.train_seconds)),
        _spread("Tokens per second", summary.tokens_per_second, format_count),
        _spread("Model TFLOP/s, attention in full", summary.model_tflops_per_second, "{:.3g}".format),
        _spread("Model TFLOP/s, attention causal", summary.model_tflops_per_second_causal, "{:.3g}".format),
        Fact("speed", "Highest memory", format_bytes(summary.memory_peak_bytes), "rank 0"),
    ]
    if summary.straggler_ratio is not None:
        spread = _spread("Slowest rank", summary.straggler_ratio, "{:.2f}".format)
        words = f"{spread.value} times the median of the ranks"
        facts.append(replace(spread, value=words, note=f"{spread.note}, most often rank {summary.slowest_rank}"))
    if summary.skipped_steps:
        facts.append(Fact("length", "Skipped steps", f"{summary.skipped_steps:,}", "not finite"))
    if summary.rollbacks:
        facts.append(Fact("length", "Rollbacks", f"{summary.rollbacks:,}", "loss spikes"))
    return facts


def setup_facts(run: Run) -> list[Fact]:
    """Return what config.yaml says about a run, by concern."""
    model, data, parallel, zero, optimizer, train = (
        _section(run, name) for name in ("model", "data", "parallel", "zero", "optimizer", "train")
    )
    parameters = _num_parameters(run)
    warmup = optimizer.get("warmup_steps")
    facts = [
        Fact("model", "Parameters", "" if parameters is None else f"{parameters:,}"),
        Fact(
            "model",
            "Positions",
            _POSITION_NAMES.get(model.get("position_method", ""), _text(model, "position_method")),
            "slopes divided by sqrt(head dimension)" if model.get("scale_alibi") else "",
        ),
        Fact("model", "Layers", _text(model, "num_layers")),
        Fact("model", "Hidden size", _text(model, "hidden_size")),
        Fact("model", "Attention heads", _text(model, "num_attention_heads")),
        Fact("model", "Feed-forward", _text(model, "ffn_hidden_size"), _text(model, "activation")),
        Fact("model", "Vocabulary", _text(model, "vocab_size")),
        Fact(
            "model",
            "Embeddings",
            _switch(model, "tie_embeddings", on="tied", off="untied"),
            "with a layer norm" if model.get("embedding_norm") else "",
        ),
        Fact("model", "Dropout", _text(model, "dropout")),
        Fact("data", "Training data", _datasets(data.get("train"))),
        Fact("data", "Validation data", _datasets(data.get("valid"))),
        Fact("data", "Training length", _text(data, "seq_length"), "tokens"),
        Fact("data", "Document mask", _switch(data, "document_mask")),
        Fact("parallel", "Tensor parallel", _text(parallel, "tensor_parallel_size"), "ranks"),
        Fact("parallel", "Sequence parallel", _switch(parallel, "sequence_parallel")),
        Fact("parallel", "ZeRO stage", _text(zero, "stage")),
        Fact("parallel", "Precision", _text(train, "precision")),
        Fact("optimizer", "Global batch", _text(train, "global_batch_size"), "sequences"),
        Fact("optimizer", "Micro batch", _text(train, "micro_batch_size"), "sequences"),
        Fact(
            "optimizer",
            "Learning rate",
            _text(optimizer, "learning_rate"),
            "" if warmup is None else f"after {warmup:,} steps of warm-up, then cosine",
        ),
        Fact("optimizer", "Weight decay", _text(optimizer, "weight_decay")),
        Fact("optimizer", "Clipping at norm", _text(optimizer, "clip_grad_norm")),
        Fact("optimizer", "Seed", str(train.get("seed", ""))),
    ]
    return [fact for fact in facts if fact.value]


def environment_facts(run: Run) -> list[Fact]:
    """Return the content of run_info.json with nested keys joined to one label, but without the number of parameters.

    The number of parameters stands with the model, in the facts of the set-up.
    """
    info = {key: value for key, value in run.info.items() if key not in _PARAMETER_KEYS}
    return [Fact("environment", label, value) for label, value in _flatten(info) if value]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        label = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{label} ")
        elif isinstance(value, (list, tuple)):
            rows.append((label, " ".join(map(str, value))))
        else:
            rows.append((label, "" if value is None else str(value)))
    return rows


def _num_parameters(run: Run) -> int | None:
    found = (run.info.get(key) for key in _PARAMETER_KEYS)
    return next((value for value in found if isinstance(value, int)), None)


def _section(run: Run, name: str) -> dict[str, Any]:
    fields = run.config.get(name)
    return fields if isinstance(fields, dict) else {}


def _text(section: Mapping[str, Any], key: str) -> str:
    value = section.get(key)
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _switch(section: Mapping[str, Any], key: str, *, on: str = "on", off: str = "off") -> str:
    value = section.get(key)
    return "" if value is None else on if value else off


def _datasets(value: object) -> str:
    """Return the prefixes of a blend, with their weights if there are several."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return ""
    entries = [entry if isinstance(entry, dict) else {"prefix": entry} for entry in value]
    if len(entries) == 1:
        return str(entries[0].get("prefix", ""))
    return ", ".join(f"{entry.get('prefix', '')} ({entry.get('weight', 1.0):g})" for entry in entries)


def _spread(label: str, quartiles: Quartiles, form: Callable[[float], str]) -> Fact:
    return Fact("speed", label, form(quartiles.median), f"[{form(quartiles.low)} – {form(quartiles.high)}]")
