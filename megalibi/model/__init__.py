"""The GPT, from token ids to the loss of each token."""

from megalibi.model.attention import check_backend
from megalibi.model.cache import KeyValueCache
from megalibi.model.dtypes import DTYPES
from megalibi.model.gpt import GPT
from megalibi.model.init import initialize
from megalibi.model.positions import model_slopes
from megalibi.model.size import count_parameters, model_flops_per_token, recomputed_flops_per_token

__all__ = [
    "DTYPES",
    "GPT",
    "KeyValueCache",
    "check_backend",
    "count_parameters",
    "initialize",
    "model_flops_per_token",
    "model_slopes",
    "recomputed_flops_per_token",
]
