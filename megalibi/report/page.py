"""The report page: one HTML file that loads nothing from elsewhere and runs no script.

This module computes what the page shows; report.html.j2 says how it is laid out, and report.css how it looks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from matplotlib.figure import Figure

from megalibi.errors import FileError
from megalibi.evaluate.result import Evaluation
from megalibi.files import make_folder, write_aside
from megalibi.metrics.records import RunMetrics
from megalibi.report import plots
from megalibi.report.facts import Fact, describe_model, environment_facts, result_facts, setup_facts
from megalibi.report.run import Run, read_run
from megalibi.units import format_bytes, format_count

REPORT_FILE = "report.html"
"""File of the report in a run's folder."""
PICTURES = ("loss.png", "speed.png", "extrapolation.png")
"""Files that `write_pictures` writes."""

_ABSENT = "–"

FactGroups = dict[str, dict[str, list["Fact | None"]]]
"""Facts by group and label, one for each run; None where a run lacks the fact."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure as the page shows it."""

    svg: Markup
    """The figure as an SVG element."""
    caption: str
    """The text below the figure."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One evaluation length as a row of text."""

    cells: tuple[str, ...]
    """The cells from left to right."""
    is_training_length: bool
    """Whether the model was trained at this length."""


@dataclass(frozen=True, kw_only=True)
class EvaluationTable:
    """One evaluation as a table of text."""

    name: str
    """What tells the evaluation from the others of the page."""
    command: str
    """The command that made it; empty if the file does not say."""
    heads: tuple[str, ...]
    """The heads of the columns; a column that would be empty is left out."""
    rows: tuple[EvaluationRow, ...]
    """The evaluation lengths in rising order."""


def write_report(run_dirs: Sequence[Path | str], output: Path | str) -> Path:
    """Write one self-contained page about one run, or about several side by side.

    What a run does not have, or does not have yet, is left out, and the page says so. The page is written aside and
    renamed.

    Args:
        run_dirs: The runs' folders (train.output_dir).
        output: The HTML file to write; its folder is made if it does not exist.

    Returns:
        The path of the page.

    Raises:
        ConfigError: A folder is not that of a run, or its config.yaml is not valid YAML.
        CheckpointError: The content of a file in a folder is not what a run writes.
        FileError: A file cannot be read, or the page cannot be written.
    """
    page = render_report([read_run(run_dir) for run_dir in run_dirs])
    output = Path(output)
    try:
        make_folder(output.parent)
        write_aside(output, page)
    except OSError as error:
        raise FileError(f"{output} cannot be written ({error.strerror}); name a file in a folder of yours") from error
    return output


def write_pictures(run_dirs: Sequence[Path | str], folder: Path | str) -> list[Path]:
    """Write the page's figures, for a README: loss.png, speed.png and, after an evaluation, extrapolation.png.

    Args:
        run_dirs: The runs' folders (train.output_dir).
        folder: Where to write the pictures; it is made if it does not exist.

    Returns:
        The paths of the pictures.

    Raises:
        ConfigError: A folder is not that of a run, or its config.yaml is not valid YAML.
        CheckpointError: The content of a file in a folder is not what a run writes.
        FileError: A file cannot be read.
    """
    runs = [read_run(run_dir) for run_dir in run_dirs]
    metrics, evaluations = _metrics_by_name(runs), _name_evaluations(runs)
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
    evaluations = _name_evaluations(runs)
    return _template().render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        runs=runs,
        describe=describe_model,
        results=_side_by_side([result_facts(run) for run in runs]),
        training_figures=_draw_training(_metrics_by_name(runs)),
        extrapolation_figure=_draw_extrapolation(evaluations),
        evaluations=[_tabulate(name, evaluation) for name, evaluation in evaluations.items()],
        setup=_side_by_side([setup_facts(run) for run in runs]),
        environment=_side_by_side([environment_facts(run) for run in runs]),
        yaml=partial(yaml.safe_dump, sort_keys=False),
    )


@cache
def _template() -> Template:
    """Return the template of the page. It escapes whatever it is given, except for Markup."""
    environment = Environment(
        loader=PackageLoader("megalibi", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("report.html.j2")


def _with_unique_names(runs: Sequence[Run]) -> list[Run]:
    """Number the runs whose folders have the same name, because names head columns and curves."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else dataclasses.replace(run, name=f"{run.name} ({position})")
        for position, run in enumerate(runs, start=1)
    ]


def _metrics_by_name(runs: Sequence[Run]) -> dict[str, RunMetrics]:
    return {run.name: run.metrics for run in runs if run.metrics.steps}


def _name_evaluations(runs: Sequence[Run]) -> dict[str, Evaluation]:
    """Name each evaluation by what tells it from the others: run, protocol, and where that is not enough, file."""
    named: dict[str, Evaluation] = {}
    for run in runs:
        for evaluation in run.evaluations:
            stride = f", stride {evaluation.stride}" if evaluation.stride else ""
            run_name = f"{run.name}, " if len(runs) > 1 else ""
            scaled = ", slopes scaled" if any(row.slope_scale is not None for row in evaluation.results) else ""
            name = f"{run_name}{evaluation.protocol}{stride}{scaled}, step {evaluation.step}"
            named[f"{name} ({evaluation.name})" if name in named else name] = evaluation
    return named


def _side_by_side(facts_by_run: Sequence[Sequence[Fact]]) -> FactGroups:
    """Lay the facts of several runs out by group and label, with a place for each run."""
    groups: FactGroups = {}
    for number, facts in enumerate(facts_by_run):
        for fact in facts:
            row = groups.setdefault(fact.group, {}).setdefault(fact.label, [None] * len(facts_by_run))
            row[number] = fact
    return groups


def _draw(figure: Figure, *, key: str, caption: str) -> Drawing:
    return Drawing(svg=Markup(plots.inline_svg(figure, key=key, title=caption)), caption=caption)


def _draw_training(metrics: dict[str, RunMetrics]) -> list[Drawing]:
    if not metrics:
        return []
    loss = _draw(
        plots.loss_curve(metrics),
        key="loss",
        caption="Loss against training tokens: every step (light), its moving mean over a fiftieth of the run, and the "
        "validation loss where there is one (points). The axis begins at the highest loss after the first twentieth of "
        "the run.",
    )
    speed = _draw(
        plots.speed_and_memory(metrics),
        key="speed",
        caption="Speed of the steps (light: every step), and memory in use with its highest so far (dashed).",
    )
    return [loss, speed]


def _draw_extrapolation(evaluations: dict[str, Evaluation]) -> Drawing | None:
    if not evaluations:
        return None
    return _draw(
        plots.extrapolation_curve(evaluations),
        key="extrapolation",
        caption="Perplexity against evaluation length. The dashed line marks the length of the training samples.",
    )


def _tabulate(name: str, evaluation: Evaluation) -> EvaluationTable:
    """Write an evaluation as a table of text, without the columns in which no row has a value."""
    columns = {
        "Length": [f"{result.length:,}" for result in evaluation.results],
        "× training": [f"{result.length / evaluation.train_seq_length:.3g}" for result in evaluation.results],
        "Slopes ×": [_or_absent(result.slope_scale, "{:.4g}".format) for result in evaluation.results],
        "Loss": [f"{result.loss:.4f}" for result in evaluation.results],
        "Perplexity": [f"{result.perplexity:.2f}" for result in evaluation.results],
        "Bits per byte": [_or_absent(result.bits_per_byte, "{:.3f}".format) for result in evaluation.results],
        "Tokens": [f"{result.tokens:,}" for result in evaluation.results],
        "Tokens/s": [_or_absent(result.tokens_per_second, format_count) for result in evaluation.results],
        "Memory": [_or_absent(result.memory_bytes, format_bytes) for result in evaluation.results],
    }
    filled = {head: cells for head, cells in columns.items() if any(cell != _ABSENT for cell in cells)}
    return EvaluationTable(
        name=name,
        command=evaluation.command,
        heads=tuple(filled),
        rows=tuple(
            EvaluationRow(cells=cells, is_training_length=result.length == evaluation.train_seq_length)
            for result, cells in zip(evaluation.results, zip(*filled.values(), strict=True), strict=True)
        ),
    )


def _or_absent(value: float | None, form: Callable[[float], str]) -> str:
    return _ABSENT if value is None else form(value)
