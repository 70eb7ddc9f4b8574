"""ZeRO 1 in bf16: gradients are added to the fp32 ones without a copy.

DeepSpeed 0.19.8 first makes an fp32 copy of each gradient. That takes 18 bytes of traffic for each parameter and micro
batch, and an fp32 tensor beside the gradient. torch can add bf16 to fp32 in registers: 10 bytes of traffic, no tensor,
and the same bits.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from functools import cache
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn

_LOGGER = logging.getLogger(__name__)

KNOWN_SOURCES = frozenset({"026f6bb3edea2557a51a5e648f43ac966e1af9d06876cc5727be00da30b4e084"})
"""SHA-256 of the source of DeepSpeed's method, in the versions that ours may replace (0.19.8)."""


def add_without_cast(optimizer: Any) -> None:
    """Let DeepSpeed's bf16 optimizer add gradients without a copy; any other optimizer is left alone.

    An optimizer of another DeepSpeed, whose method we do not know, is left alone too: it gives the same numbers in more
    time.
    """
    if type(optimizer) is not BF16_Optimizer:
        return
    if _find_source() in KNOWN_SOURCES:
        optimizer.__class__ = _Bf16Optimizer
    else:
        _LOGGER.info(
            "gradients are copied to fp32 before they are added up: this version of DeepSpeed is not known to us"
        )


@cache
def _find_source() -> str:
    """Return the checksum of the method that is replaced; empty if its source cannot be read."""
    try:
        return hashlib.sha256(inspect.getsource(BF16_Optimizer._update_hp_grad).encode()).hexdigest()
    except OSError:
        return ""


class _Bf16Optimizer(BF16_Optimizer):
    @torch.no_grad()
    def _update_hp_grad(self, lp: nn.Parameter, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        """Add the gradient of ``lp`` to its fp32 one, and note that there is one; called by DeepSpeed's hooks."""
        if lp.grad is None:
            return
        assert self.autoep_folding_tp_group is None  # it belongs to mixtures of experts, which we do not have
        hp_grad = self.fp32_groups_gradients[group_idx][param_idx]
        hp_grad.add_(lp.grad.view(hp_grad.shape))
        lp._hp_grad = hp_grad  # type: ignore[attr-defined]
        self.fp32_groups_has_gradients[group_idx][param_idx] = True
        if clear_lp_grads:
            lp.grad.zero_()
