"""From a configuration to a DeepSpeed engine around our GPT."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from megalibi.config import Config, Derived
from megalibi.engine.bf16_gradients import add_without_cast
from megalibi.engine.ds_config import deepspeed_config
from megalibi.engine.optimizer import build_optimizer
from megalibi.errors import ConfigError
from megalibi.model import DTYPES, GPT, check_backend, initialize
from megalibi.parallel import Layout, ProcessGroups


class _Mpu:
    """Our groups, under the names by which DeepSpeed asks for them."""

    def __init__(self, groups: ProcessGroups) -> None:
        self._tensor, self._data = groups.tensor, groups.data

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._tensor.handle

    def get_data_parallel_rank(self) -> int:
        return self._data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._data.handle


def build_engine(config: Config, derived: Derived, groups: ProcessGroups, device: torch.device) -> DeepSpeedEngine:
    """Return a DeepSpeed engine with an initialised model and optimizer; every rank must call it.

    torch.distributed must be initialised. Initial weights depend on ``train.seed`` and not on the number of ranks. They
    are rounded to the precision of the run at every ZeRO stage.

    Args:
        config: The configuration of the run.
        derived: What follows from it for this number of ranks.
        groups: The groups of this process.
        device: Where this rank computes.

    Raises:
        ConfigError: DeepSpeed refuses fp16 on this device, or the attention back end cannot run.
    """
    _use_deterministic_algorithms(config.train.deterministic)
    check_backend(config.model, device, DTYPES[config.train.precision])
    if config.train.precision == "fp16" and config.zero.stage > 0 and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            f"train.precision=fp16 with zero.stage={config.zero.stage}: must be bf16 or fp32, or zero.stage=0, because "
            "DeepSpeed has no fp16 on this device"
        )
    _start_deepspeed()

    ds_config = deepspeed_config(config, derived, overlap=device.type == "cuda")
    model = _build_model(config, derived, groups, device, ds_config)
    optimizer = build_optimizer(
        model.parameters(),
        config.optimizer,
        zero_stage=config.zero.stage,
        tensor=groups.tensor,
        fp16=config.train.precision == "fp16",
    )
    with contextlib.redirect_stdout(io.StringIO()):  # its BF16 optimizer prints memory tables
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, mpu=_Mpu(groups))
    add_without_cast(engine.optimizer)
    return engine


def _build_model(
    config: Config, derived: Derived, groups: ProcessGroups, device: torch.device, ds_config: dict[str, Any]
) -> GPT:
    dtype = DTYPES[config.train.precision]
    already_cut: AbstractContextManager[Any] = nullcontext()
    if config.zero.stage == 3:
        # Each layer is cut over the data ranks as soon as it is made: no rank ever holds the whole model.
        # The precision comes from ds_config: an explicit dtype is ignored where fp16 is not supported (0.19.8).
        already_cut = deepspeed.zero.Init(
            data_parallel_group=groups.data.handle, config_dict_or_path=ds_config, mpu=_Mpu(groups)
        )
    with already_cut, device:
        model = GPT(
            config.model,
            padded_vocab_size=derived.padded_vocab_size,
            layout=Layout(groups.tensor, config.parallel.sequence_parallel),
            compute_dtype=dtype,
        )
    gather = _gather if config.zero.stage == 3 else None
    initialize(model, seed=config.train.seed, group=groups.tensor, gather=gather)
    if config.zero.stage == 0:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
    return model


def _gather(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def _use_deterministic_algorithms(wanted: bool) -> None:
    """Switch them on or off in the whole process: attention's back ends too choose tiles and algorithms by this."""
    if torch.are_deterministic_algorithms_enabled() != wanted:
        torch.use_deterministic_algorithms(wanted)
        # Torch would also fill each new tensor with NaN, to show what is read before it is written. We read no such
        # memory, and the filling takes time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _start_deepspeed() -> None:
    # Warnings alone: DeepSpeed's information is hundreds of lines before the first step.
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch 2.13 replaced, and the warning names no line of ours.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # On a CPU DeepSpeed would compile a shared-memory collective at first use, for 80 s. A process killed meanwhile
    # leaves a lock behind, on which every later run waits and says nothing. gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
