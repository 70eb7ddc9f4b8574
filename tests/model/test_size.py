from __future__ import annotations

from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from megalibi.config import padded_vocab_size
from megalibi.model import count_parameters, model_flops_per_token
from megalibi.parallel import get_shard_spec
from tests.model.helpers import build_gpt, make_model, random_tokens
from tests.parallel.helpers import fake_group


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_count_is_that_of_the_built_model(bias: bool, tie_embeddings: bool) -> None:
    model = make_model(bias=bias, tie_embeddings=tie_embeddings)
    parameters = list(build_gpt(model).parameters())
    assert count_parameters(model, padded_vocab_size(model.vocab_size, 1)) == sum(p.numel() for p in parameters)
    without_padding = sum(p.numel() // p.shape[0] * spec.full_size if (spec := get_shard_spec(p)) and spec.dim == 0
                          else p.numel() for p in parameters)  # fmt: skip
    assert count_parameters(model) == without_padding


def test_count_is_that_of_all_tensor_ranks_together() -> None:
    model = make_model(bias=True)
    ranks = [build_gpt(model, fake_group(rank, 4)) for rank in range(4)]
    sharded = sum(p.numel() for gpt in ranks for p in gpt.parameters() if get_shard_spec(p) is not None)
    replicated = sum(p.numel() for p in ranks[0].parameters() if get_shard_spec(p) is None)
    assert count_parameters(model, padded_vocab_size(model.vocab_size, 4)) == sharded + replicated


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": False}, {"ffn_hidden_size": 112, "num_layers": 3}])
def test_flops_are_those_that_torch_counts(fields: dict[str, Any]) -> None:
    # The reference back end computes the whole square of scores, with plain matrix products.
    model = make_model(vocab_size=256, attention_backend="reference", **fields)
    gpt = build_gpt(model)
    batch, seq_length = 2, 24
    tokens, labels = random_tokens(batch, seq_length, vocab_size=256)
    with FlopCounterMode(display=False) as counter:
        gpt(tokens, labels).sum().backward()
    assert counter.get_total_flops() == batch * seq_length * model_flops_per_token(model, seq_length, causal=False)


def test_causal_flops_count_each_key_that_a_query_sees() -> None:
    model = make_model()
    seq_length = 37
    seen = sum(position + 1 for position in range(seq_length))
    saved = model_flops_per_token(model, seq_length, causal=False) - model_flops_per_token(
        model, seq_length, causal=True
    )
    per_pair = 12 * model.num_layers * model.hidden_size
    assert seq_length * saved == pytest.approx(per_pair * (seq_length**2 - seen), rel=1e-12)


def test_the_papers_model_has_1_3_billion_parameters() -> None:
    model = make_model(num_layers=25, hidden_size=2048, num_attention_heads=16, ffn_hidden_size=8192, vocab_size=50304)
    assert count_parameters(model) == pytest.approx(1.3e9, rel=0.05)
