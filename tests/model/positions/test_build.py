from __future__ import annotations

import torch

from megalibi.config.schema import POSITION_METHODS
from megalibi.model.positions import Alibi, Sinusoidal, build_position_method
from megalibi.parallel import ALONE
from tests.model.helpers import make_model


def test_every_method_of_the_schema_is_built() -> None:
    built = [type(build_position_method(make_model(position_method=name), ALONE)) for name in POSITION_METHODS]
    assert built == [Alibi, Sinusoidal]


def test_only_alibi_has_slopes() -> None:
    assert Sinusoidal().score_slopes(torch.device("cpu")) is None
