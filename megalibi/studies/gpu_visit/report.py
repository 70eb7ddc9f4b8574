"""The page of a visit: what failed, what bounds each part of a training step, and everything else that was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megalibi.config import config_from_dict, derive
from megalibi.measure.ceilings import COPY, SQUARE
from megalibi.measure.step_parts import PARTS
from megalibi.metrics.summary import Quartiles
from megalibi.model import count_parameters, model_flops_per_token
from megalibi.plan.gpus import Gpu
from megalibi.report.markdown import format_page, format_table
from megalibi.studies.gpu_visit.results import VisitResults
from megalibi.studies.gpu_visit.step import DONE, LOGS_FOLDER
from megalibi.units import format_bytes, format_count

_TOP_KERNELS = 15
_MAX_SAID = 300
_NONE = "-"


def format_visit(found: VisitResults) -> str:
    """Return the page in Markdown; what is not measured is left out or becomes a dash.

    Args:
        found: The results of the visit so far.
    """
    hardware = found.facts.get("hardware", {})
    title = hardware.get("gpu") or f"{hardware.get('cpu', 'a CPU')} (a trial of the visit, at toy size)"
    sections = [
        (f"# What {title} gives", _facts(found)),
        ("## What failed or was not done", _failures(found)),
        ("## What bounds each part of a step", _parts(found)),
        ("## Training", _training(found)),
        ("## Attention, forward and backward", _attention(found)),
        ("## Ceilings", _ceilings(found)),
        ("## Planned memory", _plan(found)),
        ("## The longest kernels", _kernels(found)),
        ("## The exactness contract", iter(found.contract)),
        ("## Steps", _steps(found)),
    ]
    return format_page(sections)


def _facts(found: VisitResults) -> Iterator[str]:
    facts = found.facts
    hardware = {name: value for name, value in facts.get("hardware", {}).items() if name != "memory_bytes"}
    for known in (hardware, facts.get("versions", {})):
        yield f"{', '.join(f'{name} {value}' for name, value in known.items())}."
    yield f"Commit {facts.get('commit', 'unknown')}, {facts.get('date', '')}. `{facts.get('command', '')}`"
    if facts.get("text"):
        yield ""
        yield f"Text: {facts['text']}."


def _failures(found: VisitResults) -> Iterator[str]:
    rows = [f"- **{step.name}** {step.status}: {step.said}" for step in found.outcomes if step.status != DONE]
    if found.resume is not None and not found.resume["equal"]:
        rows.insert(0, "- **resume** the resumed training is not the uninterrupted one, bit for bit: see resume.json")
    rows += [f"- `{name}`: {said[:_MAX_SAID]}" for name, said in found.failed_tests.items()]
    yield from rows or ["Nothing."]


def _parts(found: VisitResults) -> Iterator[str]:
    profile = found.profile
    if profile is None:
        return
    work, span = profile.get("work", {}), profile["span_milliseconds"]
    heads = ["part", "ms", "share", "TFLOP", "GB", "ms at the ceilings", "of the ceiling", "bound by"]
    rows = [_part_row(part, profile["parts_milliseconds"][part], span, work.get(part, {}), found) for part in PARTS]
    gaps = max(0.0, span - profile["busy_milliseconds"])
    rows.append(["gaps: the device waits for the host", f"{gaps:.2f}", f"{gaps / span:.1%}", *[_NONE] * 4, "host"])
    yield from format_table(heads, [row for row in rows if row[1] != "0.00"])
    yield ""
    yield (
        f"A step of {span:,.1f} ms under the profiler{_without_profiler(profile)}. TFLOP and GB are counted, not "
        "measured: what the model's own code computes, attention causally, and reads and writes, on the meta device "
        "(megalibi/plan/work_trace.py). At the ceilings: the longer of the two at the "
        "rates that this machine reached in large bf16 matrix products and in copies. Parts far from their ceiling "
        "have something to gain."
    )


def _without_profiler(profile: Mapping[str, Any]) -> str:
    seconds = profile.get("step_seconds", [])[1:]  # the first step compiles and allocates
    return f", {1e3 * min(seconds):,.1f} ms by the host's clock without it" if seconds else ""


def _part_row(part: str, milliseconds: float, span: float, work: Mapping[str, float], found: VisitResults) -> list[str]:
    flops, moved = work.get("flops", 0.0), work.get("bytes", 0.0)
    matmul, copy = found.ceiling(SQUARE), found.ceiling(COPY)
    row = [part, f"{milliseconds:.2f}", f"{milliseconds / span:.1%}"]
    row += [f"{flops / 1e12:.3g}" if flops else _NONE, f"{moved / 1e9:.3g}" if moved else _NONE]
    if not (flops or moved) or matmul is None or copy is None:
        return [*row, _NONE, _NONE, _NONE]
    by_flops, by_bytes = 1e3 * flops / matmul, 1e3 * moved / copy
    least = max(by_flops, by_bytes)
    share = f"{least / milliseconds:.0%}" if milliseconds else _NONE
    return [*row, f"{least:.2f}", share, "matrix products" if by_flops >= by_bytes else "memory"]


def _training(found: VisitResults) -> Iterator[str]:
    if not found.turns:
        return
    sheet, matmul = found.data_sheet, found.ceiling(SQUARE)
    heads = [
        "step",
        "parameters",
        "tokens",
        "tokens/s (range)",
        "TFLOP/s",
        "MFU of the data sheet",
        "of the matmul ceiling",
    ]
    yield from format_table(
        [*heads, "device memory"], (_turn_row(*item, sheet, matmul) for item in found.turns.items())
    )
    yield ""
    peak = (
        f"{sheet.peak_flops_per_second / 1e12:.1f} TFLOP/s ({sheet.source})" if sheet else "not known for this device"
    )
    yield (
        "Medians of all steps but the first, the optimizer included, of a model at its beginning: attention with ALiBi "
        "leaves out what its horizon allows, which depends on q and k, so a trained model takes another time. "
        "FLOP by megalibi/model/size.py, attention counted causally. "
        f"Data sheet: {peak}. Tokens: micro batch x length x micro batches."
    )


def _turn_row(name: str, turn: Mapping[str, Any], sheet: Gpu | None, matmul: float | None) -> list[str]:
    config = config_from_dict(turn["config"])
    derived = derive(config, turn["ranks"])
    seconds = turn["step_seconds"][1:] or turn["step_seconds"]
    rates = [derived.batch_tokens / second for second in seconds]
    median = Quartiles.of(rates).median
    flops = median * model_flops_per_token(config.model, config.data.seq_length, causal=True) / turn["ranks"]
    shape = f"{config.train.micro_batch_size} x {config.data.seq_length:,} x {derived.accumulation_steps}"
    return [
        f"{name}: {config.model.position_method}",
        format_count(count_parameters(config.model)),
        shape,
        f"{median:,.0f} ({min(rates):,.0f} to {max(rates):,.0f})",
        f"{flops / 1e12:,.3g}",
        _NONE if sheet is None else f"{flops / sheet.peak_flops_per_second:.1%}",
        _NONE if matmul is None else f"{flops / matmul:.1%}",
        format_bytes(turn["device_bytes"]),
    ]


def _attention(found: VisitResults) -> Iterator[str]:
    for record in found.attention.values():
        rows = [row for row in record["rows"] if row["mode"] == "forward_backward"]
        lengths = sorted({row["length"] for row in rows})
        times = {(row["name"], row["length"]): row for row in rows}
        settings = record["settings"]
        what = f"milliseconds, batch {settings['batch']}{', CUDA graph' * settings.get('cuda_graph', False)}"
        heads = [what, *(f"{length:,}" for length in lengths)]
        names = list(dict.fromkeys(row["name"] for row in rows))
        yield from format_table(heads, ([name, *(_time(times.get((name, n))) for n in lengths)] for name in names))
        yield ""
        yield from (f"{name}: {what}. " for name, what in record["what"].items() if name in names)
        yield ""
    if found.attention:
        yield "On random q and k; the horizon of ours, and so their time, is another on those of a trained model."


def _time(row: Mapping[str, Any] | None) -> str:
    return _NONE if row is None or "seconds" not in row else f"{1e3 * row['seconds']['median']:.2f}"


def _ceilings(found: VisitResults) -> Iterator[str]:
    if found.ceilings is None:
        return
    rows = (
        [
            name,
            " x ".join(f"{size:,}" for size in measured["shape"]),
            f"{measured['median']:,.4g} {measured['unit']}",
            f"{measured['low']:,.4g} to {measured['high']:,.4g}",
        ]
        for name, measured in found.ceilings.items()
    )
    yield from format_table(["", "size", "median", "range"], rows, left=2)


def _plan(found: VisitResults) -> Iterator[str]:
    if found.plan is None:
        return
    rows = (
        [
            name,
            *(format_bytes(turn[kind]["total"]) for kind in ("planned", "measured")),
            f"{turn['planned_of_measured']:.3f}",
        ]
        for name, turn in found.plan.items()
    )
    yield from format_table(["step", "planned", "measured", "planned / measured"], rows)
    yield ""
    yield "Measured: on a GPU the most that PyTorch's allocator gave, on a CPU the bytes of the tensors."


def _kernels(found: VisitResults) -> Iterator[str]:
    if found.profile is None:
        return
    rows = (
        [f"`{kernel['name'][:80]}`", kernel.get("part", _NONE), str(kernel["calls"]), f"{kernel['milliseconds']:.2f}"]
        for kernel in found.profile["kernels"][:_TOP_KERNELS]
    )
    yield from format_table(["kernel", "part", "calls", "ms"], rows, left=2)


def _steps(found: VisitResults) -> Iterator[str]:
    rows = ([step.name, step.what, step.status, f"{step.seconds:.1f}"] for step in found.outcomes)
    yield from format_table(["step", "what it finds out", "status", "seconds"], rows, left=3)
    yield ""
    yield f"Commands, commits and dates of the steps: summary.json. What each said: {LOGS_FOLDER}/."
