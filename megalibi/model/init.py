"""Initial weights as a function of the seed and each parameter's name: the same on every number of ranks.

How a parameter starts and whether weight decay may act on it is data on it, as its ShardSpec is: the module that makes
a parameter says so, and ``initialize`` and the optimizer read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalibi.config import ModelConfig
from megalibi.parallel import ColumnParallelLinear, Group, RowParallelLinear, init_normal_


@dataclass(frozen=True)
class Constant:
    """Every element starts with the same value."""

    value: float
    """The value that every element starts with."""


@dataclass(frozen=True)
class Normal:
    """Elements start as normal numbers around zero, with this standard deviation."""

    std: float
    """The standard deviation of the normal numbers."""


def set_init(parameter: nn.Parameter, init: Constant | Normal, *, may_decay: bool = True) -> None:
    """Say how a parameter starts.

    Args:
        parameter: The parameter.
        init: Its first values.
        may_decay: Let weight decay act on it if it is a matrix; False for tables of positions.
    """
    parameter.init = init  # type: ignore[attr-defined]
    parameter.may_decay = may_decay  # type: ignore[attr-defined]


def has_weight_decay(parameter: Tensor) -> bool:
    """Return whether weight decay acts on a parameter: it does on matrices that may decay, and on no vector."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 leaves an empty tensor behind
    return len(shape) > 1 and getattr(parameter, "may_decay", True)


def set_linear_init(layer: ColumnParallelLinear | RowParallelLinear, std: float) -> None:
    """Let a linear layer start with a normal weight, and a bias of zeros if it has one."""
    set_init(layer.weight, Normal(std))
    if layer.bias is not None:
        set_init(layer.bias, Constant(0.0))


def residual_std(model: ModelConfig) -> float:
    """Return the standard deviation of the matrices that write to the residual stream.

    It is smaller by sqrt(2 x layers), because 2 x layers of them are summed there (GPT-2, section 2.3).
    """
    return model.init_std / math.sqrt(2 * model.num_layers)


def xavier_std(fan_in: int, fan_out: int) -> float:
    """Return the standard deviation of Glorot and Bengio (2010)."""
    return math.sqrt(2 / (fan_in + fan_out))


def initialize(
    module: nn.Module,
    *,
    seed: int,
    group: Group,
    gather: Callable[[nn.Parameter], AbstractContextManager[object]] | None = None,
) -> None:
    """Fill every parameter as its ``set_init`` says.

    Args:
        module: A GPT.
        seed: The seed of the run.
        group: The tensor group.
        gather: Makes a parameter whole while it is written, because ZeRO 3 has cut it already; None: it is whole.

    Raises:
        ValueError: A parameter does not say how it starts.
    """
    for name, parameter in module.named_parameters():
        init = getattr(parameter, "init", None)
        if init is None:
            raise ValueError(f"{name}: call set_init on this parameter where it is made")
        with gather(parameter) if gather else nullcontext(), torch.no_grad():
            if isinstance(init, Constant):
                parameter.fill_(init.value)
            else:
                init_normal_(parameter, seed=seed, name=name, std=init.std, rank=group.rank, size=group.size)
