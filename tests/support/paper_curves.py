"""The perplexities of the paper's tables, as if an extrapolation study had measured them."""

from __future__ import annotations

from megalibi.studies import paper
from megalibi.studies.extrapolation.study import PROTOCOLS

METHODS = ("sinusoidal", "rotary", "t5_bias", "alibi")


def paper_curves(train_length: int) -> dict[str, dict[str, dict[int, float]]]:
    curves = {p: {m: paper.extrapolation(m, train_length, p) for m in METHODS} for p in PROTOCOLS}
    return {p: {m: curve for m, curve in lines.items() if curve} for p, lines in curves.items()}
