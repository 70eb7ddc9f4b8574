"""The adaptive layers against plain fp64 log-probabilities, and on several ranks against one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalibi.config import ModelConfig, adaptive_bands
from megalibi.errors import ConfigError
from megalibi.model import GPT
from megalibi.model.vocabulary.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from megalibi.model.vocabulary.loss import LOSS_CHUNK_TOKENS
from megalibi.parallel import WHOLE, get_shard_spec
from tests.support.models import FP32_RELATIVE_ERROR, VOCAB_SIZE, build_gpt, losses_and_grads, make_model, random_tokens
from tests.support.ranks import run_on_ranks
from tests.support.tensors import assert_close, fake_group, randn, tensor_group

CUTOFFS = (41, 122)  # bands of 41, 81 and 179 tokens: odd, so that all are padded on 2 and 4 ranks
FP64_ERROR = 1e-12
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "no final norm, biases": {"final_norm": False, "bias": True, "activation": "relu"},
    "one cutoff, embedding norm": {"adaptive_cutoffs": (100,), "adaptive_factor": 2, "embedding_norm": True},
    "no token in the last band": {"adaptive_cutoffs": (41, 300)},
    "recomputed": {"recompute": "full"},
}


def adaptive_model(**fields: Any) -> ModelConfig:
    return make_model(**{"adaptive_cutoffs": CUTOFFS, **fields})


def full_log_probs(output: AdaptiveSoftmax, model: ModelConfig, x_NH: Tensor) -> Tensor:
    """Log-probabilities of the whole vocabulary [N, V] in fp64, written down from the definition, on one rank."""
    x = x_NH.double()
    head = (x @ torch.cat([output.head.weight, output.head.band_weight]).double().T).log_softmax(-1)
    first, *others = adaptive_bands(model)
    columns = [head[:, : first.size]]
    for number, (band, tail) in enumerate(zip(others, output.tails, strict=True)):
        within = (x @ tail.projection.double() @ tail.weight.double().T).log_softmax(-1)
        assert within.shape[1] == band.size
        columns.append(head[:, first.size + number, None] + within)
    return torch.cat(columns, dim=1)


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_losses_are_minus_the_log_probability_of_each_token(tie_embeddings: bool) -> None:
    model = adaptive_model(tie_embeddings=tie_embeddings)
    gpt = build_gpt(model).double()
    output = gpt.output
    assert isinstance(output, AdaptiveSoftmax)
    x = randn(3, 7, 43, model.hidden_size).double()
    labels = torch.arange(VOCAB_SIZE).view(7, 43)  # each token of the vocabulary once
    expected = full_log_probs(output, model, x.flatten(0, 1))
    torch.testing.assert_close(expected.exp().sum(-1), torch.ones(VOCAB_SIZE).double(), rtol=FP64_ERROR, atol=0)
    losses = output(x, labels)
    torch.testing.assert_close(
        losses.flatten(), -expected.gather(1, labels.view(-1, 1)).squeeze(1), rtol=FP64_ERROR, atol=FP64_ERROR
    )
    torch.testing.assert_close(output.log_probs(x).flatten(0, 1), expected, rtol=FP64_ERROR, atol=FP64_ERROR)


def test_it_is_torchs_adaptive_softmax() -> None:
    """torch's has the same head and tails where both are given the same weights."""
    model = adaptive_model()
    output = build_gpt(model).output
    assert isinstance(output, AdaptiveSoftmax)
    theirs = nn.AdaptiveLogSoftmaxWithLoss(
        model.hidden_size, VOCAB_SIZE, list(CUTOFFS), div_value=float(model.adaptive_factor)
    )
    with torch.no_grad():
        theirs.head.weight.copy_(torch.cat([output.head.weight, output.head.band_weight]))
        for (projection, table), tail in zip(theirs.tail, output.tails, strict=True):
            projection.weight.copy_(tail.projection.T)
            table.weight.copy_(tail.weight)
    x, labels = randn(4, 5, 11, model.hidden_size), torch.randint(VOCAB_SIZE, (5, 11))
    expected = -theirs(x.flatten(0, 1), labels.flatten()).output
    torch.testing.assert_close(output(x, labels).flatten(), expected, rtol=1e-5, atol=1e-5)


def test_the_embedding_is_the_projected_row_times_the_root_of_its_width() -> None:
    model = adaptive_model()
    embedding = build_gpt(model).embedding
    assert isinstance(embedding, AdaptiveEmbedding)
    ids = torch.arange(VOCAB_SIZE)[None]
    rows = [
        band.table.weight.double() @ band.projection.weight.double().T * math.sqrt(model.hidden_size)
        for band in embedding.bands
    ]
    assert [len(row) for row in rows] == [41, 81, 179]
    assert_close(embedding(ids)[0].double(), torch.cat(rows), FP32_RELATIVE_ERROR, "embedding")


def test_ties_are_one_parameter_and_the_rest_is_not() -> None:
    tied, untied = (dict(build_gpt(adaptive_model(tie_embeddings=tie)).named_parameters()) for tie in (True, False))
    assert [name for name in tied if name.startswith("output")] == ["output.head.band_weight"]
    assert sorted(name for name in untied if name.startswith("output")) == [
        "output.head.band_weight", "output.head.weight", "output.tails.0.projection", "output.tails.0.weight",
        "output.tails.1.projection", "output.tails.1.weight",
    ]  # fmt: skip


def _run_variants(sequence_parallel: bool) -> list[dict[str, Tensor]]:
    group = tensor_group()
    runs = []
    for fields in VARIANTS.values():
        gpt = build_gpt(adaptive_model(**fields), group, sequence_parallel=sequence_parallel)
        runs.append(losses_and_grads(gpt))
        with torch.no_grad():
            x = randn(5, 2, 12, 48)
            runs[-1]["log_probs"] = gpt.output.log_probs(
                x.chunk(group.size, dim=1)[group.rank] if gpt.layout.sequence_parallel else x
            )
    return runs


@pytest.mark.parametrize(("size", "sequence_parallel"), [(2, False), (4, False), (2, True), (4, True)])
def test_tensor_parallel_equals_one_rank_in_losses_and_all_gradients(size: int, sequence_parallel: bool) -> None:
    by_rank = run_on_ranks(size, _run_variants, sequence_parallel)
    (expected_runs,) = run_on_ranks(1, _run_variants, False)
    for number, variant in enumerate(VARIANTS):
        for runs in by_rank:
            assert runs[number].keys() == expected_runs[number].keys()
            for name, value in expected_runs[number].items():
                if value.count_nonzero():
                    assert_close(runs[number][name], value, FP32_RELATIVE_ERROR, f"{variant}: {name}")
                else:
                    assert variant == "no token in the last band", name
                    assert not runs[number][name].count_nonzero(), name


@pytest.mark.parametrize("size", [2, 4])
def test_trap_6_and_9_weights_are_the_same_on_every_number_of_ranks_and_padding_is_zero(size: int) -> None:
    whole = build_gpt(adaptive_model())
    ranks = [build_gpt(adaptive_model(), fake_group(rank, size)) for rank in range(size)]
    for name, parameter in whole.named_parameters():
        shards = [gpt.get_parameter(name).detach() for gpt in ranks]
        if name.endswith("table.weight"):
            spec = get_shard_spec(parameter)
            assert spec is not None
            assert spec.padding == 0
            rows = torch.cat(shards)
            assert len(rows) % size == 0
            assert torch.equal(rows[: len(parameter)], parameter)
            assert rows[len(parameter) :].count_nonzero() == 0
        elif get_shard_spec(parameter) is None:
            assert all(torch.equal(shard, parameter) for shard in shards), name


def test_standard_deviations_are_fairseqs() -> None:
    model = adaptive_model(hidden_size=256, vocab_size=6000, adaptive_cutoffs=(1000, 3000), tie_embeddings=False)
    gpt = build_gpt(model)
    for number, width in enumerate((256, 64, 16)):
        band = gpt.embedding.bands[number]
        assert band.table.weight.std().item() == pytest.approx(width**-0.5, rel=0.05)
        assert band.projection.weight.std().item() == pytest.approx(math.sqrt(2 / (width + 256)), rel=0.05)
    assert gpt.output.head.weight.std().item() == pytest.approx(math.sqrt(2 / (256 + 1000)), rel=0.05)
    assert gpt.blocks[0].attention.qkv.weight.std().item() == pytest.approx(model.init_std, rel=0.05)


@pytest.mark.parametrize("label", [-1, VOCAB_SIZE, VOCAB_SIZE + 5])
def test_a_label_that_is_no_token_makes_nan(label: int) -> None:
    gpt = build_gpt(adaptive_model())
    tokens, labels = random_tokens(2, 12)
    labels[1, 5] = label
    losses = gpt(tokens, labels)
    assert losses.isnan().nonzero().tolist() == [[1, 5]]
    assert torch.equal(losses == 0, labels == -100)


def test_evaluation_in_chunks_changes_nothing() -> None:
    gpt = build_gpt(adaptive_model(num_layers=1, hidden_size=16, ffn_hidden_size=16))
    tokens, labels = random_tokens(1, 2 * LOSS_CHUNK_TOKENS + 97)
    expected = gpt(tokens, labels).detach()
    with torch.no_grad():
        torch.testing.assert_close(gpt(tokens, labels), expected, rtol=1e-5, atol=1e-6)


def _dropped(model: ModelConfig) -> Tensor:
    gpt = build_gpt(model, tensor_group())
    return gpt(*random_tokens(2, 12), micro_batch_key=3).detach()


def test_dropout_of_the_output_layer_is_keyed_and_the_same_on_all_tensor_ranks() -> None:
    model = adaptive_model(adaptive_softmax_dropout=0.2)
    plain = build_gpt(model)(*random_tokens(2, 12))
    (expected,) = run_on_ranks(1, _dropped, model)
    assert not torch.allclose(plain, expected, atol=1e-2)
    for losses in run_on_ranks(2, _dropped, model):
        assert_close(losses, expected, FP32_RELATIVE_ERROR, "losses")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adaptive_cutoffs": (50, 40)}, r"adaptive_cutoffs=\[50, 40\]: must be rising numbers between 0 and"),
        ({"adaptive_cutoffs": (VOCAB_SIZE,)}, "must be rising numbers between 0 and model.vocab_size=301"),
        ({"adaptive_cutoffs": (0, 5)}, "rising numbers"),
        (
            {"adaptive_factor": 7},
            "adaptive_factor=7: must leave a width of at least 1 to the last of 3 bands: model.hidden_size=48 is div",
        ),
        ({"padded_vocab_size": 320}, "padded_vocab_size=320: must be 0 with model.adaptive_cutoffs"),
        ({"activation_dropout": 1.0}, "model.activation_dropout=1.0: must be at least 0 and below 1"),
    ],
)
def test_what_is_no_adaptive_model_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adaptive_model(**fields)


def test_meta_device_takes_no_memory() -> None:
    with torch.device("meta"):
        gpt = GPT(adaptive_model(), padded_vocab_size=VOCAB_SIZE, layout=WHOLE)
    assert all(parameter.is_meta for parameter in gpt.parameters())
