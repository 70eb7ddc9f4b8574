from __future__ import annotations

from matplotlib.collections import PolyCollection

from megalibi.studies.extrapolation.plot import extrapolation_figure
from megalibi.studies.extrapolation.study import METHOD_NAMES, PROTOCOLS
from tests.support.paper_curves import paper_curves


def test_the_picture_writes_what_lies_beyond_its_axis() -> None:
    curves = paper_curves(512)
    figure = extrapolation_figure({1: curves}, train_length=512, stride=1)
    for axes, protocol in zip(figure.axes, PROTOCOLS, strict=True):
        top = axes.get_ylim()[1]
        written = {text.get_text() for text in axes.texts} - {"beyond"}
        assert written == {f"{v:,.0f}" for curve in curves[protocol].values() for v in curve.values() if v > top}
        assert len(written) > 3


def test_a_line_is_the_mean_and_its_band_reaches_from_the_lowest_seed_to_the_highest() -> None:
    seeds = {seed: {p: {"alibi": {8: low, 16: 5.0}} for p in PROTOCOLS} for seed, low in ((1, 4.0), (2, 4.5), (3, 6.5))}
    for axes in extrapolation_figure(seeds, train_length=8, stride=1).axes:
        (line,) = [drawn for drawn in axes.lines if drawn.get_label() == "ALiBi"]
        assert list(line.get_ydata()) == [5.0, 5.0]
        (band,) = [drawn for drawn in axes.collections if isinstance(drawn, PolyCollection)]
        corners = {(x, y) for path in band.get_paths() for x, y in path.vertices.tolist()}
        assert corners == {(8.0, 4.0), (8.0, 6.5), (16.0, 5.0)}


def test_the_names_of_all_curves_have_room() -> None:
    lines = {curve: {8: 5.0, 16: 6.0} for curve in METHOD_NAMES}
    figure = extrapolation_figure({1: dict.fromkeys(PROTOCOLS, lines)}, train_length=8, stride=1)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(METHOD_NAMES.values())
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
