from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from megalibi.config import Config, ConfigError, OptimizerConfig, config_from_dict, derive, learning_rate_at


def make_config(**sections: dict[str, Any]) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 256,
                  "vocab_size": 1000},
        "data": {"train": "corpus", "seq_length": 128},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "output_dir": "runs/x"},
    }  # fmt: skip
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    return config_from_dict(tree)


def test_derived_numbers() -> None:
    derived = derive(make_config(parallel={"tensor_parallel_size": 2}), world_size=4)
    assert dataclasses.asdict(derived) == {
        "world_size": 4,
        "data_parallel_size": 2,
        "accumulation_steps": 2,
        "padded_vocab_size": 1024,
        "batch_tokens": 1024,
    }


def test_trap_9_vocabulary_is_padded_to_128_per_tensor_rank() -> None:
    for tensor, padded in ((1, 1024), (2, 1024), (4, 1024), (3, 1152)):
        config = make_config(
            parallel={"tensor_parallel_size": tensor},
            model={"hidden_size": 48, "num_attention_heads": 12, "ffn_hidden_size": 192},
        )
        assert derive(config, tensor).padded_vocab_size == padded
    fixed = make_config(model={"padded_vocab_size": 1001})
    assert derive(fixed, 1).padded_vocab_size == 1001


@pytest.mark.parametrize(
    ("sections", "world_size", "message"),
    [
        ({"parallel": {"tensor_parallel_size": 2}}, 3,
         "parallel.tensor_parallel_size=2 does not divide the number of ranks=3"),
        ({"parallel": {"tensor_parallel_size": 3}}, 3,
         "parallel.tensor_parallel_size=3 does not divide model.num_attention_heads=4"),
        ({"parallel": {"tensor_parallel_size": 2}, "model": {"padded_vocab_size": 1001}}, 2,
         "parallel.tensor_parallel_size=2 does not divide model.padded_vocab_size=1001"),
        ({"parallel": {"tensor_parallel_size": 2}, "model": {"ffn_hidden_size": 255}}, 2,
         "parallel.tensor_parallel_size=2 does not divide model.ffn_hidden_size=255"),
        ({"parallel": {"tensor_parallel_size": 2, "sequence_parallel": True}, "data": {"seq_length": 127}}, 2,
         "parallel.tensor_parallel_size=2 does not divide data.seq_length=127"),
        ({}, 3, "train.global_batch_size=8 is no multiple of train.micro_batch_size=2 x 3 data-parallel ranks: "
                "a multiple of 6 is allowed"),
    ],
)  # fmt: skip
def test_what_ranks_cannot_divide(sections: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        derive(make_config(**sections), world_size)


def test_learning_rate_warms_up_then_falls_as_a_cosine() -> None:
    optimizer = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10)
    rates = [learning_rate_at(step, optimizer, 110) for step in range(120)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[10:110] == sorted(rates[10:110], reverse=True)
    assert rates[110:] == [pytest.approx(0.1)] * 10
    assert learning_rate_at(35, optimizer, 110) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
