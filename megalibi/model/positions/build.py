"""From a name in the configuration to a position method."""

from __future__ import annotations

from megalibi.config import ModelConfig
from megalibi.model.positions.absolute import Sinusoidal
from megalibi.model.positions.alibi import Alibi
from megalibi.model.positions.base import PositionMethod
from megalibi.parallel import Group


def build_position_method(model: ModelConfig, group: Group) -> PositionMethod:
    """Return ``model.position_method`` for this rank of the tensor group."""
    if model.position_method == "alibi":
        return Alibi(model.num_attention_heads, group)
    assert model.position_method == "sinusoidal", model.position_method  # the schema allows no other
    return Sinusoidal()
