"""The optimizers that DeepSpeed is given: AdamW and Nesterov.

At ZeRO 0 they also do what DeepSpeed does not do there: the global norm, the clipping and the loss scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalibi.config import OptimizerConfig
from megalibi.engine.ds_config import INITIAL_LOSS_SCALE_POWER, LOSS_SCALE_WINDOW
from megalibi.model.init import has_weight_decay
from megalibi.parallel import Group, all_reduce_raw, get_shard_spec

NORM_CHUNK_ELEMENTS = 2**18
"""Number of elements of a gradient that are cast to fp64 at once, for its norm: 2 MiB, which a cache can hold."""


def build_optimizer(
    parameters: Iterable[nn.Parameter], optimizer: OptimizerConfig, *, zero_stage: int, tensor: Group, fp16: bool
) -> torch.optim.Optimizer:
    """Return a fused optimizer of torch with two groups: what decays; vectors and tables of positions, which do not.

    torch's fused step runs on the CPU too, needs nothing compiled and is as fast as DeepSpeed's CPU Adam.

    Args:
        parameters: The model's parameters; under ZeRO 3 they are cut already.
        optimizer: The optimizer's kind, rates, betas and decay.
        zero_stage: At 0 the optimizer takes the norm, clips and owns the loss scale.
        tensor: The tensor group, over which the norm is summed.
        fp16: Scale the loss dynamically; it matters at ZeRO 0 only.
    """
    decaying: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in parameters:
        (decaying if has_weight_decay(parameter) else spared).append(parameter)
    options: dict[str, Any] = {"lr": optimizer.learning_rate, "fused": True}
    if zero_stage == 0:
        options |= {"clip_grad_norm": optimizer.clip_grad_norm, "tensor": tensor, "dynamic_loss_scale": fp16}
    if optimizer.kind == "nesterov":
        groups = [
            {"params": decaying, "decoupled_weight_decay": optimizer.weight_decay},
            {"params": spared, "decoupled_weight_decay": 0.0},
        ]
        options["momentum"] = optimizer.momentum
        return ClippedNesterov(groups, **options) if zero_stage == 0 else Nesterov(groups, **options)
    groups = [
        {"params": decaying, "weight_decay": optimizer.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    options |= {"betas": (optimizer.beta1, optimizer.beta2), "eps": optimizer.epsilon}
    return ClippedAdamW(groups, **options) if zero_stage == 0 else torch.optim.AdamW(groups, **options)


class Nesterov(torch.optim.SGD):
    """Nesterov's momentum, the same as fairseq's nag, with which the paper trained on WikiText-103.

    nag keeps the learning rate in its momentum and corrects it when the rate changes. With v = -buffer / rate its steps
    are v = momentum v + gradient, weight -= rate (gradient + momentum v), and these are torch's steps. Its weight decay
    is decoupled, as AdamW's is, while torch's SGD adds it to the gradient (fairseq/optim/nag.py).

    Args:
        groups: Parameter groups with ``decoupled_weight_decay``.
        lr: The learning rate.
        momentum: The factor by which the momentum decays in each step.
        fused: Take torch's fused kernel for a step.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float, fused: bool) -> None:
        super().__init__(groups, lr=lr, momentum=momentum, nesterov=True, fused=fused)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Decay the weights, then step."""
        assert closure is None
        for group in self.param_groups:
            weights = [parameter.data for parameter in group["params"] if parameter.grad is not None]
            if group["decoupled_weight_decay"] > 0.0 and weights:  # ZeRO 3 steps group by group
                torch._foreach_mul_(weights, 1.0 - group["lr"] * group["decoupled_weight_decay"])
        super().step()


class _Clipped(torch.optim.Optimizer):
    """An optimizer that clips by the global norm over the tensor group and, for fp16, owns a dynamic loss scale.

    It needs whole gradients that are reduced over the data ranks, so it serves ZeRO 0 only. The DeepSpeed engine finds
    the norm and a skipped step by the names of these attributes, ``_global_grad_norm`` and ``overflow``.

    Args:
        groups: Parameter groups.
        clip_grad_norm: Gradients of a larger norm are scaled down to this one; 0: never.
        tensor: The tensor group.
        dynamic_loss_scale: Divide gradients by a scale that halves on overflow and doubles in the 1001st good step.
        options: Further options of the optimizer that is clipped.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        clip_grad_norm: float,
        tensor: Group,
        dynamic_loss_scale: bool,
        **options: Any,
    ) -> None:
        super().__init__(groups, **options)
        self.clip_grad_norm = clip_grad_norm
        self.tensor = tensor
        self.dynamic_loss_scale = dynamic_loss_scale
        self.loss_scale = 2.0**INITIAL_LOSS_SCALE_POWER if dynamic_loss_scale else 1.0
        self.good_steps = 0
        self.overflow = False
        self._global_grad_norm = 0.0

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Unscale, measure, clip, step; leave out a step whose norm is not finite, and halve the loss scale of fp16."""
        assert closure is None
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = self._global_norm() / self.loss_scale
        self._global_grad_norm = norm
        self.overflow = not math.isfinite(norm)  # as DeepSpeed has it at ZeRO 1 to 3, in any precision
        if not self.overflow:
            clip = min(1.0, self.clip_grad_norm / (norm + 1e-6)) if self.clip_grad_norm > 0 else 1.0
            if clip != 1.0 or self.loss_scale != 1.0:
                torch._foreach_mul_(gradients, clip / self.loss_scale)
            super().step()
        self._update_loss_scale()

    def _global_norm(self) -> float:
        """Return the norm over the tensor group; what every rank holds in full is counted once, on tensor rank 0."""
        counted = [
            p.grad
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and (self.tensor.rank == 0 or get_shard_spec(p) is not None)
        ]
        squares: Tensor = torch.stack([sum_of_squares(g) for g in counted]).sum()
        return all_reduce_raw(squares, self.tensor, dist.ReduceOp.SUM).sqrt().item()

    def _update_loss_scale(self) -> None:
        if not self.dynamic_loss_scale:
            return
        self.good_steps = 0 if self.overflow else self.good_steps + 1
        if self.overflow:
            self.loss_scale = max(1.0, self.loss_scale / 2)
        elif self.good_steps > 1 and (self.good_steps - 1) % LOSS_SCALE_WINDOW == 0:  # as DeepSpeed's at ZeRO 1 to 3
            self.loss_scale *= 2

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state and the loss scale's."""
        return {**super().state_dict(), "loss_scale": self.loss_scale, "good_steps": self.good_steps}


def sum_of_squares(gradient: Tensor) -> Tensor:
    """Return the sum of the squares of all elements, a number in fp64 on the gradient's device.

    torch's ``norm()`` on a CPU adds the squares in fp32, one after the other: a norm of 4 M elements is off by 8e-5,
    one of 100 M by 1.1%. DeepSpeed takes the norms of ZeRO 1 to 3 in fp64 too. An fp64 norm first casts its whole
    argument, to twice the bytes of the gradient, so it is taken in chunks.
    """
    chunks = gradient.flatten().split(NORM_CHUNK_ELEMENTS)
    return torch.stack([torch.linalg.vector_norm(chunk, dtype=torch.float64) for chunk in chunks]).square().sum()


class ClippedAdamW(_Clipped, torch.optim.AdamW):
    """AdamW for ZeRO 0."""


class ClippedNesterov(_Clipped, Nesterov):
    """Nesterov for ZeRO 0."""
