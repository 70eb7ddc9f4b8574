from __future__ import annotations

import math
import resource
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alibi_attention import alibi_slopes
from megalibi.model import GPT
from megalibi.model.block import Block
from megalibi.parallel import ALONE, Group
from tests.support.models import (
    FP32_RELATIVE_ERROR,
    VOCAB_SIZE,
    build_gpt,
    losses_and_grads,
    make_model,
    random_tokens,
)
from tests.support.ranks import run_on_ranks
from tests.support.tensors import assert_close, tensor_group

FOR_EXPORT = {"embedding_norm": True, "norm_bias": True, "scale_alibi": True, "activation": "gelu_tanh"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"bias": True},
    "untied": {"tie_embeddings": False},
    "relu": {"activation": "relu", "bias": True, "tie_embeddings": False},
    "sinusoidal": {"position_method": "sinusoidal"},
    "sinusoidal, scaled tokens": {"position_method": "sinusoidal", "scale_embedding": True},
    "rotary": {"position_method": "rotary"},
    "t5_bias": {"position_method": "t5_bias"},
    "t5_bias, 12 heads": {"position_method": "t5_bias", "num_attention_heads": 12},
    "learned": {"position_method": "learned", "max_position_embeddings": 16},
    "none": {"position_method": "none"},
    "12 heads": {"num_attention_heads": 12},
    "20 heads": {"num_attention_heads": 20, "hidden_size": 80},
    "embedding norm, biases of norms alone, scaled slopes, gelu_tanh": FOR_EXPORT,
    "embedding norm, biases of linear layers alone, 12 heads": {
        "embedding_norm": True, "bias": True, "norm_bias": False, "scale_alibi": True, "num_attention_heads": 12,
    },
}  # fmt: skip
CU_SEQLENS = [0, 5, 12, 13, 24]
LOG_PROB_ERROR = 2e-5
"""Of a log-probability in fp32 against fp64, in nats; their largest is near 20."""


def _run_variants(sequence_parallel: bool) -> list[dict[str, Tensor]]:
    group = tensor_group()
    return [
        losses_and_grads(build_gpt(make_model(**fields), group, sequence_parallel=sequence_parallel))
        for fields in VARIANTS.values()
    ]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_equals_one_rank_in_losses_and_all_gradients(size: int, sequence_parallel: bool) -> None:
    by_rank = run_on_ranks(size, _run_variants, sequence_parallel)
    for number, (variant, fields) in enumerate(VARIANTS.items()):
        expected = losses_and_grads(build_gpt(make_model(**fields)))
        for results in by_rank:
            assert results[number].keys() == expected.keys()
            for name, value in expected.items():
                assert_close(results[number][name], value, FP32_RELATIVE_ERROR, f"{variant}: {name}")


def _log_probs_by_hand(gpt: GPT, tokens_S: Tensor, heads: int, slope_scale: float = 1.0) -> Tensor:
    """One row in fp64 as Bloom and Falcon-RW compute it: the embedding has a norm, the bias is scaled with q.k."""
    weights = {name: parameter.detach().double() for name, parameter in gpt.named_parameters()}

    def norm(x_SH: Tensor, name: str) -> Tensor:
        return F.layer_norm(x_SH, x_SH.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    length = len(tokens_S)
    distance_SS = (torch.arange(length)[:, None] - torch.arange(length)).double()
    bias_HSS = -slope_scale * alibi_slopes(heads).double()[:, None, None] * distance_SS
    x_SH = norm(weights["embedding.weight"][tokens_S], "embedding_norm")
    for layer in range(len(gpt.blocks)):
        block = f"blocks.{layer}"
        qkv = norm(x_SH, f"{block}.attention_norm") @ weights[f"{block}.attention.qkv.weight"].T
        q_HSK, k_HSK, v_HSK = qkv.view(length, 3, heads, -1).permute(1, 2, 0, 3)
        scores_HSS = (q_HSK @ k_HSK.mT + bias_HSS) / math.sqrt(q_HSK.shape[-1])
        attended_HSK = scores_HSS.masked_fill(distance_SS < 0, -math.inf).softmax(-1) @ v_HSK
        x_SH = x_SH + attended_HSK.transpose(0, 1).flatten(1) @ weights[f"{block}.attention.proj.weight"].T
        up_SF = norm(x_SH, f"{block}.mlp_norm") @ weights[f"{block}.mlp.up.weight"].T
        x_SH = x_SH + F.gelu(up_SF, approximate="tanh") @ weights[f"{block}.mlp.down.weight"].T
    logits_SV = norm(x_SH, "final_norm") @ weights["embedding.weight"][:VOCAB_SIZE].T
    return logits_SV.log_softmax(-1)


def test_options_for_export_compute_what_bloom_and_falcon_do() -> None:
    tokens, _ = random_tokens(2, 40)
    model = make_model(**FOR_EXPORT)
    gpt = build_gpt(model)
    found = gpt.log_probs(tokens)
    for row in range(2):
        expected = _log_probs_by_hand(gpt, tokens[row], model.num_attention_heads)
        torch.testing.assert_close(found[row].double(), expected, rtol=0, atol=LOG_PROB_ERROR)
    for option, value in (("embedding_norm", False), ("scale_alibi", False), ("activation", "gelu")):
        without = build_gpt(make_model(**{**FOR_EXPORT, option: value})).log_probs(tokens)
        assert (without - found).abs().max() > 10 * LOG_PROB_ERROR, option  # each of them does something


SLOPE_SCALES = ((4, 0.25), (12, 33 / 64), (4, 2.5))
"""Heads, and the factor of their slopes."""


def _scaled_log_probs(group: Group | None = None) -> list[Tensor]:
    group, (tokens, _), found = group or tensor_group(), random_tokens(2, 40), []
    for heads, factor in SLOPE_SCALES:
        gpt = build_gpt(make_model(**FOR_EXPORT, num_attention_heads=heads), group)
        gpt.log_probs(tokens[:, :1])  # the scale holds for a model that has run without
        gpt.scale_slopes(factor)
        found.append(gpt.log_probs(tokens))
    return found


def test_scaled_slopes_compute_what_a_model_with_those_slopes_does_on_one_rank_and_two() -> None:
    tokens, _ = random_tokens(2, 40)
    gpts = [build_gpt(make_model(**FOR_EXPORT, num_attention_heads=heads)) for heads, _ in SLOPE_SCALES]
    for rank in (_scaled_log_probs(ALONE), *run_on_ranks(2, _scaled_log_probs)):
        for gpt, (heads, factor), found in zip(gpts, SLOPE_SCALES, rank, strict=True):
            for row in range(2):
                expected = _log_probs_by_hand(gpt, tokens[row], heads, factor)
                torch.testing.assert_close(found[row].double(), expected, rtol=0, atol=LOG_PROB_ERROR)
            assert (found - gpt.log_probs(tokens)).abs().max() > 10 * LOG_PROB_ERROR


def test_a_scale_of_one_changes_no_bit() -> None:
    gpt = build_gpt(make_model(num_attention_heads=12))
    tokens, _ = random_tokens(2, 40)
    plain = gpt.log_probs(tokens)
    gpt.scale_slopes(0.5)
    assert not torch.equal(gpt.log_probs(tokens), plain)
    gpt.scale_slopes(1.0)
    assert torch.equal(gpt.log_probs(tokens), plain)


def test_ignored_labels_have_no_loss() -> None:
    tokens, labels = random_tokens(2, 12)
    losses = build_gpt(make_model())(tokens, labels)
    assert losses.shape == (2, 12)
    assert losses.dtype == torch.float32
    assert torch.equal(losses == 0, labels == -100)


def test_model_is_causal() -> None:
    gpt = build_gpt(make_model())
    tokens, labels = random_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 7] = (tokens[0, 7] + 1) % VOCAB_SIZE
    difference = (gpt(tokens, labels) - gpt(changed, labels)).abs()[0]
    assert difference[:7].max() == 0
    assert difference[7:].min() > 1e-4


# Methods that act on distances alone: a document knows nothing of where in the row it stands.
@pytest.mark.parametrize("method", ["alibi", "rotary", "t5_bias", "none"])
def test_packed_documents_equal_separate_rows(method: str) -> None:
    tokens, labels = random_tokens(2, 12)
    packed = build_gpt(make_model(position_method=method))
    losses = packed(tokens, labels, cu_seqlens=torch.tensor(CU_SEQLENS, dtype=torch.int32))
    losses.sum().backward()
    separate = build_gpt(make_model(position_method=method))
    stream_tokens, stream_labels = tokens.flatten(), labels.flatten()
    for start, stop in pairwise(CU_SEQLENS):
        losses_ref = separate(stream_tokens[None, start:stop], stream_labels[None, start:stop])
        losses_ref.sum().backward()
        torch.testing.assert_close(losses.flatten()[start:stop], losses_ref[0], rtol=1e-5, atol=1e-5)
    for (name, parameter), parameter_ref in zip(packed.named_parameters(), separate.parameters(), strict=True):
        assert_close(parameter.grad, parameter_ref.grad, FP32_RELATIVE_ERROR, name)
    assert not torch.allclose(losses, packed(tokens, labels), atol=1e-2)  # the mask does something


@pytest.mark.parametrize("method", ["sinusoidal", "learned"])
def test_absolute_positions_count_from_the_row_and_the_mask_holds(method: str) -> None:
    cap = {"max_position_embeddings": 12} if method == "learned" else {}
    gpt = build_gpt(make_model(position_method=method, **cap))
    tokens, labels = random_tokens(1, 12)
    documents = torch.tensor([0, 5, 12], dtype=torch.int32)
    changed = tokens.clone()
    changed[0, 2] = (tokens[0, 2] + 1) % VOCAB_SIZE
    losses = gpt(tokens, labels, cu_seqlens=documents)[0]
    assert torch.equal(losses[5:], gpt(changed, labels, cu_seqlens=documents)[0, 5:])  # not seen across documents
    alone = gpt(tokens[:, 5:], labels[:, 5:])[0]
    assert not torch.allclose(losses[5:], alone, atol=1e-2)  # there its first token has position 0, here 5


def _run_recomputed(sequence_parallel: bool) -> list[list[dict[str, Tensor]]]:
    group = tensor_group()
    pairs = []
    for method, dropout, key in (("alibi", 0.0, None), ("alibi", 0.1, 99), ("t5_bias", 0.0, None)):
        pair = []
        for recompute in ("none", "full"):
            model = make_model(
                dropout=dropout,
                bias=True,
                recompute=recompute,
                position_method=method,
                embedding_norm=method == "alibi",
            )
            gpt = build_gpt(model, group, sequence_parallel=sequence_parallel)
            calls = _count_forward_passes(gpt.blocks[0])
            pair.append(losses_and_grads(gpt, micro_batch_key=key))
            pair[-1]["forward passes"] = torch.tensor(len(calls))
        pairs.append(pair)
    return pairs


def _count_forward_passes(block: Block) -> list[Any]:
    calls: list[Any] = []
    block.register_forward_hook(lambda *_: calls.append(None))
    return calls


@pytest.mark.parametrize(("size", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_recomputation_changes_no_bit(size: int, sequence_parallel: bool) -> None:
    for pairs in run_on_ranks(size, _run_recomputed, sequence_parallel):
        for kept, recomputed in pairs:
            assert (kept.pop("forward passes"), recomputed.pop("forward passes")) == (1, 2)
            assert all(torch.equal(kept[name], recomputed[name]) for name in kept)
        assert not torch.allclose(pairs[0][0]["losses"], pairs[1][0]["losses"], atol=1e-3)  # dropout does something


def test_dropout_is_keyed() -> None:
    gpt = build_gpt(make_model(dropout=0.1))
    tokens, labels = random_tokens(2, 12)
    state = torch.get_rng_state()
    first = gpt(tokens, labels, micro_batch_key=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(first, gpt(tokens, labels, micro_batch_key=1))
    assert not torch.allclose(first, gpt(tokens, labels, micro_batch_key=2), atol=1e-3)
    assert not torch.allclose(first, gpt(tokens, labels), atol=1e-3)


def _probabilities(poison: float) -> tuple[Tensor, float, int]:
    """Probability of every token of the vocabulary after two tokens, with padded rows of the table set to a value."""
    group = tensor_group()
    gpt = build_gpt(make_model(), group)
    padded_rows = range(gpt.embedding.vocab_start, gpt.embedding.vocab_start + gpt.embedding.vocab_size_local)
    is_padding = torch.tensor([row >= VOCAB_SIZE for row in padded_rows])
    with torch.no_grad():
        gpt.embedding.weight[is_padding] = poison
    tokens = torch.tensor([[5, 300]]).expand(VOCAB_SIZE, 2)
    labels = torch.full((VOCAB_SIZE, 2), -100)
    labels[:, 1] = torch.arange(VOCAB_SIZE)
    losses = gpt(tokens, labels)
    losses.sum().backward()
    assert gpt.embedding.weight.grad is not None
    return (-losses[:, 1]).exp().detach(), gpt.embedding.weight.grad[is_padding].abs().sum().item(), len(is_padding)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_trap_9_padded_rows_get_neither_probability_nor_gradient(size: int) -> None:
    probabilities = []
    for poison in (0.0, 50.0):
        for probability_V, padded_grad, num_rows in run_on_ranks(size, _probabilities, poison):
            assert num_rows * size > VOCAB_SIZE  # there is padding
            assert probability_V.double().sum().item() == pytest.approx(1.0, abs=1e-5)
            assert padded_grad == 0.0
            probabilities.append(probability_V)
    assert all(torch.equal(probability, probabilities[0]) for probability in probabilities[1:])


TRAINED_LENGTH = 33
EVALUATED_LENGTH = 10_000
MEMORY_BOUND_BYTES = 300e6
"""Above what is there before evaluation. One head's scores alone would be 400 MB, those of a layer 1.6 GB."""


def _train_short_evaluate_long() -> tuple[float, Tensor, float]:
    """Learn a cycle of tokens at 33; return the loss there, the losses of 10,000 tokens and the memory they took."""
    gpt = build_gpt(make_model(num_layers=1, hidden_size=32, vocab_size=64, init_std=0.05))
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    stream = (torch.arange(EVALUATED_LENGTH + 1) * 23) % 64
    for step in range(60):
        starts = (torch.arange(8) * 7 + step)[:, None] + torch.arange(TRAINED_LENGTH + 1)
        loss = gpt(stream[starts[:, :-1]], stream[starts[:, 1:]]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        losses = gpt(stream[None, :-1], stream[None, 1:])[0]
    taken_bytes = 1024.0 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib)
    return loss.item(), losses, taken_bytes


def test_trained_at_33_tokens_it_evaluates_10_000_in_bounded_memory() -> None:
    ((loss, losses, taken_bytes),) = run_on_ranks(1, _train_short_evaluate_long)
    assert loss < 0.5
    assert losses.shape == (EVALUATED_LENGTH,)
    assert losses[-1000:].mean() < 1.1 * loss  # what was learned holds 300 times further
    assert taken_bytes < MEMORY_BOUND_BYTES


LONG = 16_384
LONG_MEMORY_BOUND_BYTES = 400e6
"""One head's scores alone would be 1.07 GB; the widest activation is 25 MB, the logits of a chunk 2.5 MB."""


def _evaluate_long(method: str) -> float:
    """Return the memory that 16,384 tokens at once took."""
    gpt = build_gpt(make_model(position_method=method, num_layers=1))
    tokens, labels = random_tokens(1, LONG)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        assert torch.isfinite(gpt(tokens, labels)).all()
    return 1024.0 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib)


@pytest.mark.parametrize("method", ["alibi", "sinusoidal", "rotary", "t5_bias", "none"])
def test_every_method_evaluates_16384_tokens_in_bounded_memory(method: str) -> None:
    (taken_bytes,) = run_on_ranks(1, _evaluate_long, method)
    assert taken_bytes < LONG_MEMORY_BOUND_BYTES
