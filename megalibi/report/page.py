"""The report page: one file, nothing loaded from elsewhere, no script."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from megalibi.errors import ConfigError
from megalibi.evaluate.result import Evaluation
from megalibi.files import make_folder, write_aside
from megalibi.metrics.records import RunMetrics
from megalibi.metrics.summary import summarize
from megalibi.report import plots
from megalibi.report.facts import Fact, describe, environment_facts, result_facts, setup_facts
from megalibi.report.run import Run, read_run
from megalibi.report.style import STYLESHEET
from megalibi.units import format_bytes, format_count

REPORT_FILE = "report.html"
PICTURES = ("loss.png", "speed.png", "extrapolation.png")

_FORMULA = """
<p>Model FLOP count the matrix products that the model needs, forward and backward: per token
6 × (elements of all weight matrices, the output layer included, the embedding look-up not)
+ 12 × layers × hidden size × sequence length, the second term being attention's two products, as in Megatron-LM
(arXiv:2104.04473, section 5.1). <em>In full</em> counts every query–key pair; <em>causal</em> counts of the second term
only the (sequence length + 1) / 2 keys that a query sees on average. Recomputed activations, position biases, norms,
softmax and the optimizer are not counted. Rates are of all ranks together, over the wall time of a step.</p>
<p>Ranges in brackets are interquartile, over the recorded steps. Losses are in nats per token; perplexity is their
exponential. Memory is what rank 0 used: on a GPU what the allocator handed out, on a CPU the process's resident
set.</p>
"""


def write_report(run_dirs: Sequence[Path | str], output: Path | str) -> Path:
    """Write one self-contained page about one run, or about several side by side.

    What a run does not have (yet) is left out, and the page says so. The page is written aside and renamed.

    Args:
        run_dirs: The runs' folders (train.output_dir).
        output: The HTML file to write; its folder is made if it does not exist.

    Returns:
        The path of the page.

    Raises:
        ConfigError: A folder is no run's, a file in it cannot be read, or the page cannot be written.
    """
    page = render_report([read_run(run_dir) for run_dir in run_dirs])
    output = Path(output)
    try:
        make_folder(output.parent)
        write_aside(output, page)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written ({error.strerror}); name a file in a folder of yours") from error
    return output


def write_pictures(run_dirs: Sequence[Path | str], folder: Path | str) -> list[Path]:
    """Write the page's figures, for a README: loss.png, speed.png and, after an evaluation, extrapolation.png.

    Raises:
        ConfigError: A folder is no run's, or a file in it cannot be read.
    """
    runs = [read_run(run_dir) for run_dir in run_dirs]
    metrics, evaluations = _metrics_by_name(runs), _named_evaluations(runs)
    figures: dict[str, Figure] = {}
    if metrics:
        figures |= {"loss": plots.loss_curve(metrics), "speed": plots.speed_and_memory(metrics)}
    if evaluations:
        figures["extrapolation"] = plots.extrapolation_curve(evaluations)
    paths = {Path(folder) / f"{name}.png": figure for name, figure in figures.items()}
    make_folder(folder)
    for path, figure in paths.items():
        plots.save_figure(figure, path)
    return list(paths)


def render_report(runs: Sequence[Run]) -> str:
    """Return the page about some runs as HTML text."""
    runs = _with_unique_names(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    sections = [
        _header(runs, title),
        _results(runs),
        _training(runs),
        _extrapolation(runs),
        _setup(runs),
        _section("How the numbers are counted", _FORMULA),
        *(_full_config(run) for run in runs if run.config),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · megalibi</title>\n<style>{STYLESHEET}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + '\n<footer class="muted">Written by megalibi from the files of the run.</footer>\n</body>\n</html>\n'
    )


def _with_unique_names(runs: Sequence[Run]) -> list[Run]:
    """Number the runs whose folders have the same name: names head columns and curves."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else dataclasses.replace(run, name=f"{run.name} ({position})")
        for position, run in enumerate(runs, start=1)
    ]


def _header(runs: Sequence[Run], title: str) -> str:
    lines = [f"<h1>{escape(title)}</h1>"]
    for run in runs:
        name = f"<strong>{escape(run.name)}</strong>: " if len(runs) > 1 else ""
        lines.append(f'<p class="lead">{name}{escape(describe(run))}</p>')
    return f"<header>{''.join(lines)}</header>"


def _results(runs: Sequence[Run]) -> str:
    if all(summarize(run.metrics) is None for run in runs):
        return _section("Results", _missing("No step is recorded yet: the results follow with the first."))
    notes = [
        _missing(f"{run.name}: no validation is recorded.")
        for run in runs
        if run.metrics.steps and not run.metrics.validations
    ]
    return _section("Results", _fact_table(runs, [result_facts(run) for run in runs]) + "".join(notes))


def _metrics_by_name(runs: Sequence[Run]) -> dict[str, RunMetrics]:
    return {run.name: run.metrics for run in runs if run.metrics.steps}


def _training(runs: Sequence[Run]) -> str:
    metrics = _metrics_by_name(runs)
    if not metrics:
        return ""
    loss = _figure(
        plots.loss_curve(metrics),
        key="loss",
        caption="Loss against training tokens: every step (light), its moving mean over a fiftieth of the run, and the "
        "validation loss where there is one (points). The axis begins at the highest loss after the first twentieth of "
        "the run.",
    )
    speed = _figure(
        plots.speed_and_memory(metrics),
        key="speed",
        caption="Speed of the steps (light: every step), and memory in use with its highest so far (dashed).",
    )
    return _section("Training", loss + speed)


def _extrapolation(runs: Sequence[Run]) -> str:
    evaluations = _named_evaluations(runs)
    if not evaluations:
        return _section(
            "Beyond the training length",
            _missing("No evaluation yet. tools/evaluate.py writes one; name it evaluation.json in the run's folder."),
        )
    without = [run.name for run in runs if not run.evaluations]
    figure = _figure(
        plots.extrapolation_curve(evaluations),
        key="extrapolation",
        caption="Perplexity against evaluation length. The dashed line marks the length of the training samples.",
    )
    tables = "".join(_evaluation_table(name, evaluation) for name, evaluation in evaluations.items())
    notes = _missing(f"No evaluation yet: {', '.join(without)}.") if without else ""
    return _section("Beyond the training length", figure + tables + notes)


def _named_evaluations(runs: Sequence[Run]) -> dict[str, Evaluation]:
    """Name each evaluation by what tells it from the others: run, protocol, and where that is not enough, file."""
    named: dict[str, Evaluation] = {}
    for run in runs:
        for evaluation in run.evaluations:
            stride = f", stride {evaluation.stride}" if evaluation.stride else ""
            run_name = f"{run.name}, " if len(runs) > 1 else ""
            name = f"{run_name}{evaluation.protocol}{stride}, step {evaluation.step}"
            named[f"{name} ({evaluation.name})" if name in named else name] = evaluation
    return named


def _evaluation_table(name: str, evaluation: Evaluation) -> str:
    columns = ["Length", "× training", "Loss", "Perplexity", "Bits per byte", "Tokens", "Tokens/s", "Memory"]
    rows = [
        [
            f"{result.length:,}",
            f"{result.length / evaluation.train_seq_length:.3g}",
            f"{result.loss:.4f}",
            f"{result.perplexity:.2f}",
            "–" if result.bits_per_byte is None else f"{result.bits_per_byte:.3f}",
            f"{result.tokens:,}",
            "–" if result.tokens_per_second is None else format_count(result.tokens_per_second),
            "–" if result.memory_bytes is None else format_bytes(result.memory_bytes),
        ]
        for result in evaluation.results
    ]
    filled = [index for index in range(len(columns)) if any(row[index] != "–" for row in rows)]
    head = "".join(f'<th scope="col">{columns[index]}</th>' for index in filled)
    body = ""
    for result, row in zip(evaluation.results, rows, strict=True):
        mark = ' class="trained"' if result.length == evaluation.train_seq_length else ""
        body += f"<tr{mark}>{_cells(row[index] for index in filled)}</tr>"
    command = f"<br><code>{escape(evaluation.command)}</code>" if evaluation.command else ""
    return (
        f'<div class="scroll"><table class="numbers"><caption>{escape(name)}.{command}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _setup(runs: Sequence[Run]) -> str:
    parts = []
    if any(run.config for run in runs):
        parts.append(_fact_table(runs, [setup_facts(run) for run in runs]))
    parts.extend(_missing(f"{run.name}: its folder has no config.yaml.") for run in runs if not run.config)
    if any(run.info for run in runs):
        parts.append("<h2>Environment</h2>" + _fact_table(runs, [environment_facts(run) for run in runs]))
    return _section("The run" if len(runs) == 1 else "The runs", "".join(parts))


def _full_config(run: Run) -> str:
    text = yaml.safe_dump(run.config, sort_keys=False)
    return f"<details><summary>config.yaml of {escape(run.name)}</summary><pre>{escape(text)}</pre></details>"


def _fact_table(runs: Sequence[Run], facts: Sequence[Sequence[Fact]]) -> str:
    """Lay facts out with one row per label and one column per run; a run that lacks a fact gets a dash."""
    groups: dict[str, dict[str, list[str]]] = {}
    for column, column_facts in enumerate(facts):
        for fact in column_facts:
            row = groups.setdefault(fact.group, {}).setdefault(fact.label, ["–"] * len(runs))
            row[column] = f"{escape(fact.value)}" + (f" <small>{escape(fact.note)}</small>" if fact.note else "")
    head = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    return (
        '<div class="scroll"><table class="facts">'
        + (f"<thead><tr><th></th>{head}</tr></thead>" if len(runs) > 1 else "")
        + "".join(f'<tbody class="group">{_rows(rows)}</tbody>' for rows in groups.values())
        + "</table></div>"
    )


def _rows(rows: dict[str, list[str]]) -> str:
    return "".join(f'<tr><th scope="row">{escape(label)}</th>{_cells(cells)}</tr>' for label, cells in rows.items())


def _cells(cells: Iterable[str]) -> str:
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _missing(text: str) -> str:
    return f'<p class="muted">{escape(text)}</p>'


def _figure(figure: Figure, *, key: str, caption: str) -> str:
    svg = plots.inline_svg(figure, key=key, title=caption)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
