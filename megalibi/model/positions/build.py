"""From a name in the configuration to a position method."""

from __future__ import annotations

from megalibi.config import ModelConfig
from megalibi.model.positions.alibi import Alibi
from megalibi.model.positions.base import PositionMethod
from megalibi.model.positions.learned import Learned
from megalibi.model.positions.rotary import Rotary
from megalibi.model.positions.sinusoidal import Sinusoidal
from megalibi.model.positions.t5_bias import T5Bias
from megalibi.parallel import Group

METHODS: dict[str, type[PositionMethod]] = {
    "alibi": Alibi,
    "sinusoidal": Sinusoidal,
    "rotary": Rotary,
    "t5_bias": T5Bias,
    "learned": Learned,
    "none": PositionMethod,
}
"""The class of each method that ``model.position_method`` can name, all of ``config.model.POSITION_METHODS``."""


def build_position_method(model: ModelConfig, group: Group) -> PositionMethod:
    """Return ``model.position_method`` for this rank of the tensor group."""
    return METHODS[model.position_method](model, group)
