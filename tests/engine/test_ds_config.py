from __future__ import annotations

import pytest

from megalibi.config import derive
from megalibi.engine.ds_config import deepspeed_config
from tests.support.runs import STAGES, make_config


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_is_told_what_the_configuration_says(stage: int, precision: str) -> None:
    config = make_config(
        "tokens",
        train={"precision": precision, "global_batch_size": 24, "micro_batch_size": 3},
        zero={"stage": stage},
        parallel={"tensor_parallel_size": 2},
    )
    derived = derive(config, 4)
    ds_config = deepspeed_config(config, derived, overlap=False)
    assert ds_config["zero_optimization"]["stage"] == stage
    assert ds_config["train_batch_size"] == 24
    assert ds_config["train_batch_size"] == (
        ds_config["train_micro_batch_size_per_gpu"]
        * ds_config["gradient_accumulation_steps"]
        * derived.data_parallel_size
    )
    # ZeRO 0 keeps fp32 parameters and leaves clipping and loss scale to our optimizer.
    assert ds_config["bf16"]["enabled"] == (precision == "bf16" and stage > 0)
    assert ds_config["fp16"]["enabled"] == (precision == "fp16" and stage > 0)
    assert ds_config["gradient_clipping"] == (config.optimizer.clip_grad_norm if stage > 0 else 0.0)
    assert not ds_config["timers"]["throughput"]["enabled"]
    assert ds_config["communication_data_type"] == ds_config["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize("overlap", [False, True])
def test_overlap_is_the_devices(overlap: bool) -> None:
    config = make_config("tokens")
    assert deepspeed_config(config, derive(config, 1), overlap=overlap)["zero_optimization"]["overlap_comm"] == overlap
