"""ZeRO 1 in bf16: gradients are added to the fp32 ones as they are.

DeepSpeed 0.19.8 first makes an fp32 copy of each: 18 bytes of traffic for a parameter and micro batch, and a tensor of
fp32 beside the gradient. torch adds the two types itself, in registers: 10 bytes, no tensor, the same bits.
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
"""SHA-256 of DeepSpeed's method, of the versions that ours was written beside (0.19.8)."""


def add_without_cast(optimizer: Any) -> None:
    """Let DeepSpeed's bf16 optimizer add gradients as they are; any other optimizer is left alone.

    So is one of a DeepSpeed whose method is not the known one: nothing but time depends on it.
    """
    if type(optimizer) is not BF16_Optimizer:
        return
    if _find_source() in KNOWN_SOURCES:
        optimizer.__class__ = _Bf16Optimizer
    else:
        _LOGGER.info("DeepSpeed adds up gradients in a way of its own version: fp32 copies are made on the way")


@cache
def _find_source() -> str:
    """Return the checksum of the method that is replaced; empty if its source is not to be had."""
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
        assert self.autoep_folding_tp_group is None  # of mixtures of experts, which we do not have
        hp_grad = self.fp32_groups_gradients[group_idx][param_idx]
        hp_grad.add_(lp.grad.view(hp_grad.shape))
        lp._hp_grad = hp_grad  # type: ignore[attr-defined]
        self.fp32_groups_has_gradients[group_idx][param_idx] = True
        if clear_lp_grads:
            lp.grad.zero_()
