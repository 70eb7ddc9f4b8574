from __future__ import annotations

from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from megalibi.config import adaptive_bands, padded_vocab_size
from megalibi.model import count_parameters, model_flops_per_token, recomputed_flops_per_token
from megalibi.model.vocabulary.adaptive import TAIL_TOKENS
from megalibi.parallel import get_shard_spec
from tests.support.models import build_gpt, make_model, random_tokens
from tests.support.tensors import fake_group


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_count_is_that_of_the_built_model(bias: bool, tie_embeddings: bool) -> None:
    model = make_model(bias=bias, tie_embeddings=tie_embeddings)
    parameters = list(build_gpt(model).parameters())
    assert count_parameters(model, padded_vocab_size(model.vocab_size, 1)) == sum(p.numel() for p in parameters)
    without_padding = sum(p.numel() // p.shape[0] * spec.full_size if (spec := get_shard_spec(p)) and spec.dim == 0
                          else p.numel() for p in parameters)  # fmt: skip
    assert count_parameters(model) == without_padding


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("final_norm", [False, True])
def test_count_of_an_adaptive_model_is_that_of_the_built_one(tie_embeddings: bool, final_norm: bool) -> None:
    model = make_model(adaptive_cutoffs=(41, 122), tie_embeddings=tie_embeddings, final_norm=final_norm, bias=True)
    assert count_parameters(model) == sum(p.numel() for p in build_gpt(model).parameters())


@pytest.mark.parametrize("fields", [{"position_method": "t5_bias", "t5_num_buckets": 20},
                                    {"position_method": "learned", "max_position_embeddings": 77}])  # fmt: skip
def test_count_has_the_tables_of_learned_positions(fields: dict[str, Any]) -> None:
    model = make_model(**fields)
    parameters = sum(p.numel() for p in build_gpt(model).parameters())
    assert count_parameters(model, padded_vocab_size(model.vocab_size, 1)) == parameters


@pytest.mark.parametrize("fields", [{"norm_bias": True}, {"bias": True, "norm_bias": False}, {}])
def test_count_has_the_norms_and_biases_that_there_are(fields: dict[str, Any]) -> None:
    for final_norm in (False, True):
        model = make_model(embedding_norm=True, final_norm=final_norm, **fields)
        parameters = sum(p.numel() for p in build_gpt(model).parameters())
        assert count_parameters(model, padded_vocab_size(model.vocab_size, 1)) == parameters


def test_count_is_that_of_all_tensor_ranks_together() -> None:
    model = make_model(bias=True, embedding_norm=True)
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


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_flops_of_an_adaptive_model_are_those_that_torch_counts_without_a_token_of_a_later_band(
    tie_embeddings: bool,
) -> None:
    model = make_model(adaptive_cutoffs=(50, 122), tie_embeddings=tie_embeddings, attention_backend="reference")
    gpt = build_gpt(model)
    tokens, labels = random_tokens(2, 24, vocab_size=50)
    with FlopCounterMode(display=False) as counter:
        gpt(tokens, labels).sum().backward()
    filling = 6 * TAIL_TOKENS * sum(band.width * (48 + band.size) for band in adaptive_bands(model)[1:])
    assert counter.get_total_flops() == 2 * 24 * model_flops_per_token(model, 24, causal=False) + filling


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


def test_recomputation_adds_what_torch_counts() -> None:
    counts, batch, seq_length = {}, 2, 24
    tokens, labels = random_tokens(batch, seq_length, vocab_size=256)
    for recompute in ("none", "full"):
        model = make_model(vocab_size=256, attention_backend="reference", recompute=recompute)
        gpt = build_gpt(model)
        with FlopCounterMode(display=False) as counter:
            gpt(tokens, labels).sum().backward()
        counts[recompute] = counter.get_total_flops()
        added = batch * seq_length * recomputed_flops_per_token(model, seq_length)
        assert counts[recompute] - counts["none"] == added
    assert counts["full"] > counts["none"]
