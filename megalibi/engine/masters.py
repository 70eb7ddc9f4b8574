"""What a rank's optimizer holds of each parameter, wherever DeepSpeed keeps it: views to save and to load.

An optimizer steps on fp32 weights and keeps states of the same size beside them. A tensor rank's slice of a parameter,
flattened, is cut over the data ranks in another way at every ZeRO stage:

- ZeRO 0: not at all; the parameters themselves are the fp32 weights.
- ZeRO 1 and 2: all parameters of a group lie one after the other in a flat tensor, which is cut into equal parts. A
  part begins and ends in the middle of a parameter.
- ZeRO 3: each parameter is padded and cut on its own, and the parts lie one after the other in flat tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import Tensor

STATES = {"adamw": ("exp_avg", "exp_avg_sq"), "nesterov": ("momentum_buffer",)}
"""The states that torch's optimizers keep for each element, by ``optimizer.kind``."""


@dataclass(frozen=True)
class Master:
    """A stretch of a parameter that this rank steps on: n elements of its tensor rank's slice, flattened."""

    name: str
    """The parameter's name in the model."""
    start: int
    """The first of the n elements."""
    weight: Tensor
    """The weights themselves, [n], in fp32."""
    states: dict[str, Tensor]
    """The optimizer's states by torch's names, each [n]."""


@dataclass(frozen=True, kw_only=True)
class OptimizerProgress:
    """What the optimizer has done, and the loss scale of fp16; the same on every rank."""

    updates: int
    """The number of updates that the optimizer has made, skipped steps not included; nesterov counts none."""
    loss_scale: float
    """The factor by which the loss is multiplied; 1 unless the precision is fp16."""
    good_steps: int
    """The number of steps since the loss scale fell, or since the start."""


def find_masters(engine: DeepSpeedEngine, kind: str) -> list[Master]:
    """Return what this rank's optimizer holds, in the order of the model; before its first step the states are zero.

    Args:
        engine: The engine that build_engine returned.
        kind: ``optimizer.kind`` of its configuration.
    """
    _make_states(engine, kind)
    return list(_iterate_masters(engine, STATES[kind]))


def _iterate_masters(engine: DeepSpeedEngine, states: tuple[str, ...]) -> Iterator[Master]:
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    flats = _find_flats(engine)
    for name, parameter in engine.module.named_parameters():
        if stage == 0:
            flat, start, offset, length = parameter, 0, 0, parameter.numel()
        elif stage == 3:
            group, offset, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat = flats[group]
            start = part * optimizer._get_param_partition_rank(parameter)
            length = min(part, parameter.ds_numel - start)  # the last parts may be padding
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            flat = flats[mapping.param_group_index]
            start, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
            length = mapping.hp_fragment_address.numel
        else:
            continue
        if length > 0:
            kept = _torch_optimizer(engine).state[flat]
            views = [tensor.detach().view(-1)[offset : offset + length] for tensor in (flat, *map(kept.get, states))]
            yield Master(name, start, views[0], dict(zip(states, views[1:], strict=True)))


def hand_out_weights(engine: DeepSpeedEngine) -> None:
    """Give the model the weights that the optimizers hold, after they were written; every rank calls it."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer.checkpoint_event_prologue()
        for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
            optimizer._unflatten_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()


def read_progress(engine: DeepSpeedEngine) -> OptimizerProgress:
    """Return what the optimizer has done."""
    states = _torch_optimizer(engine).state
    updates = max((int(states[flat]["step"]) for flat in _find_flats(engine) if "step" in states[flat]), default=0)
    scaler = _find_scaler(engine)
    if engine.zero_optimization_stage() == 0:
        return OptimizerProgress(updates=updates, loss_scale=scaler.loss_scale, good_steps=scaler.good_steps)
    if scaler is None:
        return OptimizerProgress(updates=updates, loss_scale=1.0, good_steps=0)
    return OptimizerProgress(updates=updates, loss_scale=float(scaler.cur_scale), good_steps=read_good_steps(scaler))


def read_good_steps(scaler: DynamicLossScaler) -> int:
    """Return the number of steps since DeepSpeed's loss scale fell, or since the start."""
    return int(scaler.cur_iter - scaler.last_overflow_iter - 1)


def write_progress(engine: DeepSpeedEngine, progress: OptimizerProgress) -> None:
    """Let the optimizer go on from what another one has done; find_masters has made its states."""
    states = _torch_optimizer(engine).state
    for flat in _find_flats(engine):
        if "step" in states[flat]:
            states[flat]["step"].fill_(progress.updates)
    scaler = _find_scaler(engine)
    if engine.zero_optimization_stage() == 0:
        scaler.loss_scale, scaler.good_steps = progress.loss_scale, progress.good_steps
    elif scaler is not None:
        scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = progress.loss_scale, progress.good_steps, -1


def _find_scaler(engine: DeepSpeedEngine) -> Any:
    """Return what has the loss scale: our optimizer at ZeRO 0, or DeepSpeed's dynamic scaler; None if it has none."""
    if engine.zero_optimization_stage() == 0:
        return engine.optimizer
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def _torch_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    optimizer = engine.optimizer
    return optimizer if engine.zero_optimization_stage() == 0 else optimizer.optimizer


def _find_flats(engine: DeepSpeedEngine) -> list[Tensor]:
    """Return the tensors on which the optimizer of this rank steps."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        return list(engine.module.parameters())
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    is_bf16 = hasattr(optimizer, "fp32_groups_flat_partition")
    return list(optimizer.fp32_groups_flat_partition if is_bf16 else optimizer.single_partition_of_fp32_groups)


def _make_states(engine: DeepSpeedEngine, kind: str) -> None:
    """Give the optimizer the states that it makes in its first step, if it has not taken one."""
    states = _torch_optimizer(engine).state
    for flat in _find_flats(engine):
        for name in STATES[kind]:
            if states[flat].get(name) is None:
                states[flat][name] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        if kind == "adamw" and "step" not in states[flat]:
            states[flat]["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
