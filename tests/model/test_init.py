from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megalibi.model import GPT, initialize
from megalibi.model.init import Normal, has_weight_decay, set_init
from megalibi.parallel import ALONE, get_shard_spec, unshard
from tests.support.models import VOCAB_SIZE, build_gpt, make_model
from tests.support.tensors import fake_group

MODEL = make_model(num_layers=3, hidden_size=64, ffn_hidden_size=256, tie_embeddings=False, init_std=0.1)


def full_weights(ranks: list[GPT]) -> dict[str, Tensor]:
    """Whole parameters by name from the ranks of a tensor group."""
    by_name: dict[str, Tensor] = {}
    for name, parameter in ranks[0].named_parameters():
        spec = get_shard_spec(parameter)
        shards = [gpt.get_parameter(name).detach() for gpt in ranks]
        by_name[name] = shards[0] if spec is None else unshard(shards, spec)
    return by_name


def build_ranks(size: int, seed: int = 7) -> list[GPT]:
    return [build_gpt(MODEL, fake_group(rank, size), seed=seed) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 4])
def test_trap_6_initial_weights_do_not_depend_on_the_tensor_parallel_size(size: int) -> None:
    expected, actual = full_weights(build_ranks(1)), full_weights(build_ranks(size))
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())


def test_initial_weights_depend_on_the_seed() -> None:
    first, other = full_weights(build_ranks(1)), full_weights(build_ranks(1, seed=8))
    assert all(torch.equal(first[name], other[name]) == ("norm" in name) for name in first)


def test_standard_deviations() -> None:
    for name, weight in full_weights(build_ranks(1)).items():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        writes_to_residual = name.endswith(("attention.proj.weight", "mlp.down.weight"))
        std = 0.1 / math.sqrt(2 * 3) if writes_to_residual else 0.1
        assert weight.std().item() == pytest.approx(std, rel=0.05), name
        assert weight.mean().item() == pytest.approx(0.0, abs=0.01), name


@pytest.mark.parametrize(
    ("method", "spared"),
    [("t5_bias", {"positions.table.weight"}), ("learned", {"positions.table.weight"}), ("alibi", set())],
)
def test_weight_decay_spares_vectors_and_tables_of_positions(method: str, spared: set[str]) -> None:
    cap = 16 if method == "learned" else 0
    gpt = build_gpt(make_model(position_method=method, max_position_embeddings=cap, bias=True))
    matrices = {name for name, parameter in gpt.named_parameters() if parameter.ndim > 1}
    assert spared <= matrices
    assert {name for name, parameter in gpt.named_parameters() if has_weight_decay(parameter)} == matrices - spared


def test_biases_start_at_zero() -> None:
    gpt = build_gpt(make_model(bias=True))
    names = [name for name, _ in gpt.named_parameters() if name.endswith("bias")]
    assert len(names) == 2 * 6 + 1


@pytest.mark.parametrize("size", [1, 2, 4])
def test_trap_9_padded_rows_are_zero(size: int) -> None:
    for name in ("embedding.weight", "output.weight"):
        rows = torch.cat([gpt.get_parameter(name).detach() for gpt in build_ranks(size)])
        assert len(rows) == {1: 384, 2: 512, 4: 512}[size]
        assert rows[VOCAB_SIZE:].count_nonzero() == 0
        assert rows[:VOCAB_SIZE].count_nonzero(dim=1).min() > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": True, "tie_embeddings": False, "embedding_norm": True},
        {"position_method": "learned", "max_position_embeddings": 8},
        {"position_method": "t5_bias"},
        {"adaptive_cutoffs": (41, 122), "tie_embeddings": False},
    ],
)
def test_a_parameter_says_itself_how_it_starts_whatever_its_name(fields: dict[str, Any]) -> None:
    gpt = build_gpt(make_model(**fields))
    for parameter in gpt.parameters():
        set_init(parameter, Normal(0.5))
    initialize(gpt, seed=1, group=ALONE)
    for name, parameter in gpt.named_parameters():
        assert 0.2 < parameter[parameter != 0].std() < 0.8, name


def test_a_parameter_that_does_not_say_how_it_starts_is_named() -> None:
    gpt = build_gpt(make_model())
    del gpt.blocks[1].mlp.up.weight.init
    message = r"^blocks\.1\.mlp\.up\.weight: call set_init on this parameter where it is made$"
    with pytest.raises(ValueError, match=message):
        initialize(gpt, seed=1, group=ALONE)
