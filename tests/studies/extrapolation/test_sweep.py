from __future__ import annotations

import math
from pathlib import Path

import pytest

from megalibi.errors import DivergenceError
from megalibi.metrics.records import METRICS_FILE, ValidationRecord
from megalibi.studies.extrapolation.study import method_config
from megalibi.studies.extrapolation.sweep import Sweep, format_sweeps, read_sweeps
from tests.studies.extrapolation.test_study import make_study
from tests.support.diverged import write_divergence
from tests.support.runs import make_config


@pytest.mark.parametrize(
    ("losses", "chosen", "is_at_edge"),
    [
        ({0.1: 5.0, 0.2: 4.0, 0.3: 4.5}, 0.2, False),
        ({0.1: 3.9, 0.2: 4.0, 0.3: 4.5}, 0.1, True),
        ({0.1: 5.0, 0.2: 4.0, 0.3: 3.9}, 0.3, True),
        ({0.1: 4.0, 0.2: 4.0, 0.3: 4.5}, 0.1, True),
        ({0.1: 5.0, 0.2: 4.0, 0.3: math.inf}, 0.2, False),
        ({0.1: 5.0}, 0.1, False),  # no sweep has no edge
    ],
)
def test_the_lowest_loss_chooses_the_rate(losses: dict[float, float], chosen: float, is_at_edge: bool) -> None:
    sweep = Sweep(losses=losses)
    assert (sweep.chosen, sweep.is_at_edge) == (chosen, is_at_edge)
    assert ("at the edge of the sweep" in str(sweep)) is is_at_edge


def test_the_page_has_every_loss_and_marks_the_choice() -> None:
    alibi, rotary = (
        Sweep(losses={0.001: 4.9, 0.002: 4.8, 0.004: math.inf}),
        Sweep(losses={0.001: 5, 0.002: 4.7, 0.004: 4.6}),
    )
    assert list(format_sweeps({"alibi": alibi, "rotary": rotary}))[:4] == [
        "|  | 0.001 | 0.002 | 0.004 | chosen |",
        "|---|--:|--:|--:|--:|",
        "| rotary | 5.0000 | 4.7000 | **4.6000** | 0.004 at the edge of the sweep |",
        "| ALiBi | 4.9000 | **4.8000** | diverged | 0.002 |",
    ]


def test_the_losses_are_the_last_of_the_first_seeds_runs(tmp_path: Path) -> None:
    """A loss that was lower on the way, or from another seed, is none that a final model has."""
    base = make_config("tokens", train={"steps": 20, "output_dir": str(tmp_path)})
    study = make_study(methods=("alibi",), learning_rates=(0.001, 0.002), seeds=(5, 6))
    for rate, seed, losses in ((0.001, 5, (3.0, 4.1)), (0.002, 5, (5.0, 4.0)), (0.001, 6, (2.0, 2.0))):
        folder = Path(method_config(base, "alibi", rate, seed).train.output_dir)
        folder.mkdir()
        records = [
            ValidationRecord(
                step=step,
                tokens=step,
                validation_loss=loss,
                validation_perplexity=math.exp(loss),
                validation_tokens=1,
                validation_seconds=1.0,
            )
            for step, loss in zip((10, 20), losses, strict=True)
        ]
        (folder / METRICS_FILE).write_text("".join(record.to_json() + "\n" for record in records))
    assert read_sweeps(study, base) == {"alibi": Sweep(losses={0.001: 4.1, 0.002: 4.0})}


def test_a_method_that_diverges_with_every_rate_has_none_to_go_on_with(tmp_path: Path) -> None:
    base = make_config("tokens", train={"steps": 20, "output_dir": str(tmp_path)})
    study = make_study(methods=("alibi",), learning_rates=(0.001, 0.002), seeds=(5,))
    for rate in study.learning_rates:
        write_divergence(method_config(base, "alibi", rate, 5), 7)
    with pytest.raises(DivergenceError, match=r"^alibi has diverged with every learning rate: add lower study\.learn"):
        read_sweeps(study, base)
