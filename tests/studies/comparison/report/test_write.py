"""The sentences on what a comparison ran."""

from __future__ import annotations

from megalibi.studies.baselines import describe_sinusoidal
from megalibi.studies.comparison.report.write import describe_comparison
from tests.support.runs import make_config
from tests.support.turns import STUDY


def test_which_sinusoidal_positions_were_trained_is_said() -> None:
    base = make_config("tokens", data={"seq_length": 32}, model={"sinusoidal_amplitude": 0.125})
    facts = describe_comparison(STUDY, base, gpu="", is_plan=False, is_rehearsal=False)
    said = describe_sinusoidal(base.model)
    assert "beside a table of amplitude 0.125;" in said
    assert facts.count(said) == 1
