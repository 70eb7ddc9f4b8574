"""Sets the environment variables that torch, CUDA and its libraries read as they begin, unless the user has set them.

torch reads some of them when it is imported, so they are set before.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from megalibi.config import Config
from megalibi.errors import ConfigError

_BLACKWELL = 10
"""The major number of the compute capability of these GPUs."""
_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""The values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS gives the same sums every time; torch refuses others."""
_NVIDIA_SMI_SECONDS = 30


def set_environment(config: Config) -> None:
    """Set the variables that a run wants; those for its GPUs have no effect without one.

    Raises:
        ConfigError: A variable that the user has set contradicts the configuration.
    """
    compute_capability = find_compute_capability() if _orders_kernels(config) else None
    os.environ.update(choose_settings(config, os.environ, compute_capability))


def choose_settings(config: Config, environment: Mapping[str, str], compute_capability: int | None) -> dict[str, str]:
    """Return the variables to set.

    Args:
        config: The run.
        environment: The variables that are set already, and stay.
        compute_capability: The major number of the host's GPUs; None if it is not known.

    Raises:
        ConfigError: ``train.deterministic`` with a CUBLAS_WORKSPACE_CONFIG that is not deterministic.
    """
    # Nothing here is for Dynamo to compile. DeepSpeed decorates its Muon with torch.compile, for which every rank would
    # import the compiler: two of nine seconds of a processor that a rank of the smallest run takes.
    wanted = {"TORCHDYNAMO_DISABLE": "1"}
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(environment):
        # Memory that was in use for tensors of one size can be used for those of another: validations and documents
        # have other shapes than training. The older name is set because every torch reads it; torch 2.9 to 2.11 know
        # PYTORCH_ALLOC_CONF and do not heed this option there (pytorch/pytorch#183387).
        wanted["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if _orders_kernels(config) and (compute_capability is None or compute_capability < _BLACKWELL):
        # One queue to the GPU: kernels begin in the order of their launches. The collective that sums an input's
        # gradient over the tensor group is launched before the product that it is to run beside, and must get its
        # few multiprocessors before the product takes all of them (Megatron-LM, core/tensor_parallel/layers.py).
        wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if config.train.deterministic:
        workspace = environment.get("CUBLAS_WORKSPACE_CONFIG", _DETERMINISTIC_WORKSPACES[0])
        if workspace not in _DETERMINISTIC_WORKSPACES:
            raise ConfigError(
                f"CUBLAS_WORKSPACE_CONFIG={workspace} in the environment: must be unset or "
                f"{' or '.join(_DETERMINISTIC_WORKSPACES)} with train.deterministic=true"
            )
        wanted["CUBLAS_WORKSPACE_CONFIG"] = workspace
        # NVLink's switches add in any order (NVIDIA/nccl#1497).
        wanted["NCCL_NVLS_ENABLE"] = "0"
    return {name: value for name, value in wanted.items() if name not in environment}


def find_compute_capability() -> int | None:
    """Return the smallest major number among the host's GPUs; None if there is none, or nvidia-smi does not say.

    torch could say, but only after CUDA has begun, which is too late to set anything.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS).stdout
        return min((int(line.partition(".")[0]) for line in said.splitlines()), default=None)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _orders_kernels(config: Config) -> bool:
    """Return whether a run gains from kernels that begin in the order of their launches.

    Under ZeRO 3 weights are gathered on a stream of their own, ahead of their use, which one queue would hold up:
    Megatron-LM refuses the setting with its fully sharded data parallelism.
    """
    return config.parallel.tensor_parallel_size > 1 and config.zero.stage < 3
