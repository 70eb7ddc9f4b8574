from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from megalibi.config import (
    AdaptiveBand,
    Config,
    OptimizerConfig,
    adaptive_bands,
    config_from_dict,
    derive,
    learning_rate_at,
)
from megalibi.errors import ConfigError


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
         "parallel.tensor_parallel_size=2: must divide the job's 3 ranks"),
        ({"parallel": {"tensor_parallel_size": 3}}, 3,
         "parallel.tensor_parallel_size=3: must divide model.num_attention_heads=4"),
        ({"parallel": {"tensor_parallel_size": 2}, "model": {"padded_vocab_size": 1001}}, 2,
         "parallel.tensor_parallel_size=2: must divide model.padded_vocab_size=1001"),
        ({"parallel": {"tensor_parallel_size": 2}, "model": {"ffn_hidden_size": 255}}, 2,
         "parallel.tensor_parallel_size=2: must divide model.ffn_hidden_size=255"),
        ({"parallel": {"tensor_parallel_size": 2, "sequence_parallel": True}, "data": {"seq_length": 127}}, 2,
         "parallel.tensor_parallel_size=2: must divide data.seq_length=127 with parallel.sequence_parallel=true"),
        ({}, 3,
         "train.global_batch_size=8: must be a multiple of 6 (train.micro_batch_size=2 x 3 data-parallel ranks)"),
    ],
)  # fmt: skip
def test_what_ranks_cannot_divide(sections: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        derive(make_config(**sections), world_size)


def test_adaptive_bands_are_padded_each_on_its_own() -> None:
    config = make_config(model={"adaptive_cutoffs": [41, 122]})
    assert adaptive_bands(config.model) == [
        AdaptiveBand(0, 41, 64), AdaptiveBand(41, 122, 16), AdaptiveBand(122, 1000, 4)
    ]  # fmt: skip
    assert derive(config, 1).padded_vocab_size == 1000
    sections = {"model": {"adaptive_cutoffs": [41, 122]}, "parallel": {"tensor_parallel_size": 4}}
    assert derive(make_config(**sections), 4).padded_vocab_size == 44 + 84 + 880


def test_the_papers_warm_up_starts_above_zero_and_its_cosine_ends_at_the_minimum() -> None:
    """fairseq's cosine scheduler: 16,000 updates of warm-up from 1e-7 to 1, then one period of 270,000 to 1e-4."""
    optimizer = OptimizerConfig(
        learning_rate=1.0, min_learning_rate=1e-4, warmup_steps=16_000, warmup_init_learning_rate=1e-7
    )

    def fairseq(update: int) -> float:
        if update < 16_000:
            return 1e-7 + update * (1.0 - 1e-7) / 16_000
        return 1e-4 + 0.5 * (1.0 - 1e-4) * (1.0 + math.cos(math.pi * (update - 16_000) / 270_000))

    for step in (16_000, 17_000, 100_000, 285_999, 286_000):
        assert learning_rate_at(step, optimizer, 286_000) == pytest.approx(fairseq(step), rel=1e-12)
    for step in (0, 1, 777, 15_998, 15_999):  # the rate of a warm-up step is the one it ends with
        assert learning_rate_at(step, optimizer, 286_000) == pytest.approx(fairseq(step + 1), rel=1e-12)
    with pytest.raises(
        ConfigError, match=r"optimizer\.warmup_init_learning_rate=2\.0: must be at most optimizer\.learning_rate=1"
    ):
        OptimizerConfig(learning_rate=1.0, warmup_init_learning_rate=2.0)
    with pytest.raises(
        ConfigError,
        match=r"optimizer\.decay_steps=5: must be 0, for train\.steps, or at least optimizer\.warmup_steps=10, until",
    ):
        OptimizerConfig(learning_rate=1.0, warmup_steps=10, decay_steps=5)
    OptimizerConfig(learning_rate=1.0, warmup_steps=10, decay_steps=10)


def test_learning_rate_warms_up_then_falls_as_a_cosine() -> None:
    optimizer = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10)
    rates = [learning_rate_at(step, optimizer, 110) for step in range(120)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[10:110] == sorted(rates[10:110], reverse=True)
    assert rates[110:] == [pytest.approx(0.1)] * 10
    assert learning_rate_at(35, optimizer, 110) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
