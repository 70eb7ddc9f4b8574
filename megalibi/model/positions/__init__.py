"""How a model knows order: one file per method."""

from megalibi.model.positions.absolute import Sinusoidal, sinusoidal_table
from megalibi.model.positions.alibi import Alibi
from megalibi.model.positions.base import PositionMethod
from megalibi.model.positions.build import build_position_method

__all__ = ["Alibi", "PositionMethod", "Sinusoidal", "build_position_method", "sinusoidal_table"]
