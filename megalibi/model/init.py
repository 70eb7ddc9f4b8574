"""Initial weights as a function of the seed and each parameter's name: the same on every number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from megalibi.config import ModelConfig
from megalibi.parallel import Group, init_normal_


def initialize(
    module: nn.Module,
    model: ModelConfig,
    *,
    seed: int,
    group: Group,
    gather: Callable[[nn.Parameter], AbstractContextManager[object]] | None = None,
) -> None:
    """Fill every parameter: norms with ones, biases with zeros, matrices from a normal distribution.

    The matrices that write to the residual stream get a standard deviation smaller by sqrt(2 x layers), because
    2 x layers of them are summed there (GPT-2, section 2.3).

    Args:
        module: A GPT.
        model: What it was built from.
        seed: Of the run.
        group: The tensor group.
        gather: Makes a parameter whole while it is written, for ZeRO 3 has cut it already; None: it is whole.
    """
    residual_std = model.init_std / math.sqrt(2 * model.num_layers)
    for name, parameter in module.named_parameters():
        with gather(parameter) if gather else nullcontext(), torch.no_grad():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                std = residual_std if name.endswith(("proj.weight", "down.weight")) else model.init_std
                std = getattr(parameter, "init_std", std)  # an adaptive layer's own, from its shape
                init_normal_(parameter, seed=seed, name=name, std=std, rank=group.rank, size=group.size)
