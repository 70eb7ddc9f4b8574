from __future__ import annotations

import pytest

from megalibi.studies.comparison.report.plot import training_curves
from megalibi.studies.comparison.study import ATTENTIONS
from tests.support.paper_comparison import paper_results


def test_figure_5_has_both_clocks_and_both_pairs() -> None:
    results = paper_results()
    assert results.has_curves
    figure = training_curves(results)
    assert [axes.get_title() for axes in figure.axes] == [
        f"evaluated at {length}, {attention} attention" for attention in ATTENTIONS for length in ("1,024", "2,048")
    ]
    assert all(len(axes.lines) == 2 for axes in figure.axes)
    alibi = figure.axes[1].lines[0]
    assert alibi.get_label() == "ALiBi, 1,024"
    assert (alibi.get_xdata()[-1], alibi.get_ydata()[-1]) == (pytest.approx(5975), 8.92)  # type: ignore[index]
