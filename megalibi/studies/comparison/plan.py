"""What a comparison will need, before anything is allocated: shapes and memory, computed on the meta device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megalibi.config import Config, derive
from megalibi.errors import ConfigError
from megalibi.model import GPT
from megalibi.parallel import WHOLE
from megalibi.plan.gpus import GIB, USABLE
from megalibi.plan.memory_trace import MemoryByKind
from megalibi.plan.run_plan import plan_memory
from megalibi.studies.comparison.study import ATTENTIONS, CompareStudy, Variant, variant_config, variants

PLANNED = {"unfused": "unfused", "fast": "fused"}
"""Kind of attention -> the name that the plan of a run has for it."""


def plan_variants(base: Config, study: CompareStudy, *, device_type: str) -> dict[Variant, MemoryByKind]:
    """Return the memory that a rank of each variant will hold at the peak of a step.

    Args:
        base: The study's configuration.
        study: Its section ``study``.
        device_type: Where the ranks compute, cuda or cpu.

    Raises:
        ConfigError: A variant's configuration does not fit the ranks.
    """
    plans = {}
    for variant in variants(study):
        config = variant_config(base, study, variant)
        plans[variant] = plan_memory(
            config, derive(config, study.ranks), attention=PLANNED[variant.attention], device_type=device_type
        )
    return plans


def select_plans(plans: Mapping[Variant, MemoryByKind], base: Config, part: str) -> dict[Variant, MemoryByKind]:
    """Return the plans of the variants that a part of the comparison runs.

    Args:
        plans: From plan_variants.
        base: The study's configuration.
        part: "speed" and "all" run both kinds of attention; "quality" trains with that of model.attention_backend.
    """
    own = "unfused" if base.model.attention_backend == ATTENTIONS["unfused"] else "fast"
    return {variant: plan for variant, plan in plans.items() if part != "quality" or variant.attention == own}


def find_shapes(base: Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of the whole model, by name; both position methods have the same weights."""
    padded = derive(base, base.parallel.tensor_parallel_size).padded_vocab_size
    with torch.device("meta"):
        model = GPT(base.model, padded_vocab_size=padded, layout=WHOLE)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def check_fits(plans: Mapping[Variant, MemoryByKind], gpu: str, memory_bytes: int) -> None:
    """Refuse GPUs that are too small, before anything is allocated.

    Args:
        plans: Plans of the variants that will run, from plan_variants or select_plans.
        gpu: Name of the GPU that each rank computes on.
        memory_bytes: Memory of one such GPU.

    Raises:
        ConfigError: The largest variant does not fit. The message says what it needs and which fields to change.
    """
    variant, memory = max(plans.items(), key=lambda plan: plan[1].total)
    if memory.total > USABLE * memory_bytes:
        raise ConfigError(
            f"{variant.name} needs {memory.total / GIB:.1f} GiB ({describe_memory(memory)}) on each GPU, and "
            f"{USABLE:.0%} of {gpu}'s {memory_bytes / GIB:.1f} are there for it: set model.recompute=full, lower "
            "train.micro_batch_size with data.seq_length, or take more ranks (study.ranks with "
            "parallel.tensor_parallel_size or zero.stage)"
        )


def describe_memory(memory: MemoryByKind) -> str:
    """Return the kinds of memory in GiB, the largest first; those below 0.05 GiB are left out."""
    parts = {name.replace("_", " "): getattr(memory, name) / GIB for name in MemoryByKind.__dataclass_fields__}
    return ", ".join(f"{name} {part:.1f}" for name, part in sorted(parts.items(), key=lambda p: -p[1]) if part >= 0.05)
