"""How a model knows order: one file per method."""

from megalibi.model.positions.alibi import Alibi, model_slopes
from megalibi.model.positions.base import PositionMethod, ScoreBias
from megalibi.model.positions.build import METHODS, build_position_method

__all__ = ["METHODS", "Alibi", "PositionMethod", "ScoreBias", "build_position_method", "model_slopes"]
