from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from megalibi.evaluate.result import Evaluation, EvaluationResult
from megalibi.metrics.records import RunMetrics, StepRecord
from megalibi.report import plots
from megalibi.report.run import read_run

MakeStep = Callable[..., StepRecord]


@pytest.fixture
def metrics(write_run: Callable[..., Path]) -> RunMetrics:
    return read_run(write_run("plotted")).metrics


def make_evaluation(train_seq_length: int, perplexities: dict[int, float]) -> Evaluation:
    return Evaluation(
        name="evaluation",
        step=1,
        train_seq_length=train_seq_length,
        protocol="nonoverlapping",
        results=tuple(
            EvaluationResult(length=length, loss=math.log(value), perplexity=value, tokens=1)
            for length, value in perplexities.items()
        ),
    )


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_the_loss_curve_shows_every_step_its_mean_and_the_validations(metrics: RunMetrics) -> None:
    figure = plots.loss_curve({"run": metrics})
    every_step, mean, validation = figure.axes[0].get_lines()
    assert list(every_step.get_ydata()) == [record.loss for record in metrics.steps]
    assert list(every_step.get_xdata()) == [record.tokens for record in metrics.steps]
    assert len(mean.get_ydata()) == len(metrics.steps)
    assert list(validation.get_ydata()) == [3.5, 3.5]
    assert labels(figure) == ["training", "validation"]


def test_against_steps_the_axis_is_steps(metrics: RunMetrics) -> None:
    axes = plots.loss_curve({"run": metrics}, against="steps").axes[0]
    assert list(axes.get_lines()[0].get_xdata()) == list(range(1, 41))
    assert axes.get_xlabel() == "optimizer steps"


def test_several_runs_are_told_apart_by_colour_and_name(metrics: RunMetrics) -> None:
    figure = plots.loss_curve({"a": metrics, "b": metrics})
    assert labels(figure) == ["a", "b"]
    assert len({line.get_color() for line in figure.axes[0].get_lines()}) == 2


def test_a_diverged_loss_does_not_stop_the_figure(make_step: MakeStep) -> None:
    losses = [5.0, 4.0, math.nan, math.inf, 3.0]
    steps = tuple(make_step(i, loss=loss) for i, loss in enumerate(losses, start=1))
    figure = plots.loss_curve({"run": RunMetrics(steps=steps, validations=())})
    assert 5.0 < figure.axes[0].get_ylim()[1] < 5.5
    assert "<path" in plots.inline_svg(figure, key="k", title="t")


def test_a_run_in_which_nothing_is_finite_still_gives_a_figure(make_step: MakeStep) -> None:
    figure = plots.loss_curve({"run": RunMetrics(steps=(make_step(1, loss=math.nan),), validations=())})
    assert plots.inline_svg(figure, key="k", title="t").startswith("<svg")


def test_smoothing_is_a_centred_mean_that_leaves_out_what_is_not_finite() -> None:
    values = np.arange(150.0)
    values[75] = np.nan
    smooth = plots._smooth(values)
    assert smooth[10] == 10.0
    assert smooth[75] == 75.0
    assert smooth[0] == 0.5  # of 0 and 1: the window ends at the edge
    np.testing.assert_array_equal(plots._smooth(np.full(5, np.nan)), np.full(5, np.nan))


def test_thinning_keeps_spikes_and_order() -> None:
    x = np.arange(100_000.0)
    y = np.sin(x)
    y[31_415] = 50.0
    y[77_777] = np.nan
    thin_x, thin_y = plots._thin(x, y)
    assert len(thin_x) <= plots._MAX_POINTS
    assert thin_y.max() == 50.0
    assert (np.diff(thin_x) > 0).all()
    assert np.isfinite(thin_y).all()


def test_the_extrapolation_curve_marks_the_training_length() -> None:
    figure = plots.extrapolation_curve({"alibi": make_evaluation(64, {64: 30.0, 128: 29.0, 256: 28.5})})
    axes = figure.axes[0]
    assert list(axes.get_lines()[0].get_ydata()) == [30.0, 29.0, 28.5]
    assert [text.get_text() for text in axes.texts] == ["training length 64"]
    assert list(axes.get_xticks()) == [64, 128, 256]
    assert axes.get_yscale() == "linear"


def test_a_model_that_breaks_down_makes_the_axis_logarithmic() -> None:
    evaluations = {
        "alibi": make_evaluation(64, {64: 30.0, 128: 29.0}),
        "sinusoidal": make_evaluation(64, {64: 30.0, 128: 4000.0, 256: math.inf}),
    }
    figure = plots.extrapolation_curve(evaluations)
    assert figure.axes[0].get_yscale() == "log"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["alibi", "sinusoidal"]
    assert "<path" in plots.inline_svg(figure, key="k", title="t")


def test_speed_and_memory_begin_at_zero(metrics: RunMetrics) -> None:
    speed, memory = plots.speed_and_memory({"run": metrics}).axes
    assert (speed.get_ylim()[0], memory.get_ylim()[0]) == (0.0, 0.0)
    assert set(speed.get_lines()[0].get_ydata()) == {1024.0}
    assert set(memory.get_lines()[0].get_ydata()) == {1.2}


def test_an_inline_figure_is_well_formed_themed_and_keeps_its_ids_to_itself(metrics: RunMetrics) -> None:
    first, second = (
        plots.inline_svg(plots.loss_curve({"run": metrics}), key=key, title='of "a" & b') for key in ("one", "two")
    )
    root = ElementTree.fromstring(first)
    assert root.get("aria-label") == 'of "a" & b'
    assert "width" not in root.attrib
    assert "var(--series-0, #0072b2)" in first
    assert not re.search(r":\s*#(0072b2|1f2430|ffffff)", first)
    ids = re.findall(r'\bid="([^"]+)"', first)
    assert len(ids) == len(set(ids))
    assert not set(ids) & set(re.findall(r'\bid="([^"]+)"', second))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', first)) <= set(ids)


def test_the_same_figure_is_the_same_text(metrics: RunMetrics) -> None:
    first, second = (plots.inline_svg(plots.loss_curve({"run": metrics}), key="k", title="t") for _ in range(2))
    assert first == second


def test_a_figure_for_a_readme(tmp_path: Path, metrics: RunMetrics) -> None:
    plots.save_figure(plots.loss_curve({"run": metrics}), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_pyplot_is_not_used() -> None:
    assert "matplotlib.pyplot" not in Path(plots.__file__).read_text()
