from __future__ import annotations

from pathlib import Path

import pytest

from megalibi.errors import DivergenceError
from megalibi.studies.extrapolation.evaluations import check_converged, final_runs
from megalibi.studies.extrapolation.sweep import Sweep
from tests.studies.extrapolation.test_study import make_study
from tests.support.diverged import write_divergence
from tests.support.runs import make_config


def test_a_chosen_rate_that_diverges_from_another_seed_is_named_with_what_to_do(tmp_path: Path) -> None:
    base = make_config("tokens", train={"steps": 20, "output_dir": str(tmp_path)})
    sweep = Sweep(losses={0.001: 5.0, 0.002: 4.0})
    runs = final_runs(make_study(seeds=(5, 6)), base, {"alibi": sweep, "learned": sweep})
    check_converged(runs)
    write_divergence(runs[6]["alibi"], 7)
    folder = tmp_path / "alibi_lr_0.002_seed_6"
    with pytest.raises(DivergenceError) as error:
        check_converged(runs)
    assert str(error.value) == (
        f"alibi with learning rate 0.002, its best at the first seed, has diverged from seed 6 at step 7 ({folder}): "
        "take this rate out of study.learning_rates, or put a lower one in its place; what else is trained is kept"
    )
