"""The DeepSpeed configuration, computed from ours in this one place and never written by hand."""

from __future__ import annotations

from typing import Any

from megalibi.config import Config, Derived

NEVER = 10**12
"""A number of steps that no run reaches."""

INITIAL_LOSS_SCALE_POWER = 16
LOSS_SCALE_WINDOW = 1000
"""In fp16 the loss scale starts at 2^16, halves when a gradient overflows and doubles in the 1001st step without an
overflow (the values of arXiv:1710.03740's implementations)."""


def deepspeed_config(config: Config, derived: Derived, *, overlap: bool) -> dict[str, Any]:
    """Return what ``deepspeed.initialize`` takes.

    ZeRO 0 runs DeepSpeed in fp32 whatever the precision: DeepSpeed has no ZeRO 0 with 16-bit weights and fp32 gradient
    accumulation, so there the parameters themselves are the fp32 master weights, the model computes in 16 bits, and
    clipping and loss scaling are those of engine/optimizer.py.

    Args:
        config: The configuration of the run.
        derived: What follows from it for this number of ranks.
        overlap: Reduce gradients during the backward pass; it needs a device with streams.
    """
    stage = config.zero.stage
    precision = config.train.precision if stage > 0 else "fp32"
    # DeepSpeed refuses an odd number of 16-bit elements where it gathers, because parts must be aligned to 4 bytes.
    bucket_elements = config.zero.bucket_elements + config.zero.bucket_elements % 2
    return {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": derived.accumulation_steps,
        "gradient_clipping": config.optimizer.clip_grad_norm if stage > 0 else 0.0,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket_elements,
            "allgather_bucket_size": bucket_elements,
            "overlap_comm": overlap,
            "contiguous_gradients": True,
            "memory_efficient_linear": False,  # True replaces torch.nn.functional.linear in the whole process
        },
        "zero_allow_untested_optimizer": True,  # torch's AdamW(fused=True)
        # Add each gradient to the fp32 ones at once, and do not keep it beside them; ZeRO 1 alone reads this.
        "bf16": {"enabled": precision == "bf16", "immediate_grad_update": True},
        "fp16": {
            "enabled": precision == "fp16",
            "loss_scale": 0,  # dynamic
            "initial_scale_power": INITIAL_LOSS_SCALE_POWER,
            "loss_scale_window": LOSS_SCALE_WINDOW,
            "hysteresis": 1,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": NEVER,
        "timers": {"throughput": {"enabled": False}},  # the timer waits for the device twice in a micro batch
    }
