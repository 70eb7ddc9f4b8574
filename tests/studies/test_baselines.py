from __future__ import annotations

from typing import Any

import pytest

from megalibi.studies.baselines import describe_sinusoidal
from tests.support.models import make_model


@pytest.mark.parametrize(
    ("fields", "tokens", "amplitude"),
    [
        ({"init_std": 0.25}, "as they are", "0.25; in the paper's code the tokens are "),
        ({"sinusoidal_amplitude": 0.0025}, "as they are", "0.0025; in the paper's code the tokens are "),
        ({"adaptive_cutoffs": (100,)}, "multiplied by sqrt(hidden size)", "1, as in the paper's code."),
        ({"scale_embedding": True}, "multiplied by sqrt(hidden size)", "1, as in the paper's code."),
        ({"scale_embedding": True, "sinusoidal_amplitude": 0.5}, "multiplied by sqrt(hidden size)", "0.5; in the "),
    ],
)
def test_tokens_and_table_are_said_as_a_model_has_them(fields: dict[str, Any], tokens: str, amplitude: str) -> None:
    said = describe_sinusoidal(make_model(position_method="sinusoidal", **fields))
    assert said.startswith(f"Sinusoidal: tokens {tokens} beside a table of amplitude {amplitude}")
