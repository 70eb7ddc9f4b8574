from __future__ import annotations

from megalibi.studies.extrapolation.plot import extrapolation_figure
from megalibi.studies.extrapolation.study import PROTOCOLS
from tests.support.paper_curves import paper_curves


def test_the_picture_writes_what_lies_beyond_its_axis() -> None:
    curves = paper_curves(512)
    figure = extrapolation_figure(curves, train_length=512, stride=1)
    for axes, protocol in zip(figure.axes, PROTOCOLS, strict=True):
        top = axes.get_ylim()[1]
        written = {text.get_text() for text in axes.texts} - {"beyond"}
        assert written == {f"{v:,.0f}" for curve in curves[protocol].values() for v in curve.values() if v > top}
        assert len(written) > 3
