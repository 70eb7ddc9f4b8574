from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalibi.errors import ConfigError
from megalibi.generate.decoder import Decoder, feed_each
from megalibi.generate.run import TextRow, check_room, generate
from megalibi.generate.sampling import Sampler, Sampling
from megalibi.model import GPT
from megalibi.parallel import ALONE, Group
from tests.support.models import VOCAB_SIZE, build_gpt, make_model, random_tokens
from tests.support.ranks import run_on_ranks
from tests.support.tensors import tensor_group

LOG_PROB_ERROR = 1e-5
"""fp32, between a token at a time with a cache and one pass over the whole text."""
GREEDY = Sampling(temperature=0.0)
SEEKER, SOUGHT = 7, 11
"""Tokens of the planted model: the query of one fits the key of the other."""
PLANTED_PROMPT, PLANTED_LENGTH = 845, 860


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return build_gpt(make_model()).eval()


class RecordingSampler(Sampler):
    """Keeps the log-probabilities that it chooses by."""

    def __init__(self, sampling: Sampling, number: int = 0) -> None:
        super().__init__(sampling, number)
        self.seen: list[Tensor] = []

    def choose(self, log_probs_V: Tensor) -> int:
        self.seen.append(log_probs_V)
        return super().choose(log_probs_V)


def greedy_in_full(gpt: GPT, tokens: list[int], first: int) -> tuple[Tensor, list[int]]:
    """The log-probabilities after each of a text's tokens from ``first`` on, in one pass, and the likeliest tokens."""
    log_probs = gpt.log_probs(torch.tensor([tokens]), first=first)[0]
    return log_probs, log_probs.argmax(-1).tolist()


def assert_greedy_is_full_recomputation(gpt: GPT, prompt: list[int], max_tokens: int, horizon_eps: float) -> Decoder:
    decoder, sampler = Decoder(gpt, horizon_eps=horizon_eps), RecordingSampler(GREEDY)
    row = TextRow(decoder, prompt, sampler, max_tokens=max_tokens, num_tokens=VOCAB_SIZE, end_of_document_id=-1)
    assert list(generate([row])) == [row]
    assert len(row.tokens) == max_tokens
    assert not row.ended
    log_probs, likeliest = greedy_in_full(gpt, decoder.tokens, len(prompt) - 1)
    assert float((torch.stack(sampler.seen) - log_probs).abs().max()) < LOG_PROB_ERROR
    assert row.tokens == likeliest
    return decoder


@pytest.mark.parametrize("horizon_eps", [0.0, 2.0**-24])
def test_greedy_text_is_that_of_full_recomputation(gpt: GPT, horizon_eps: float) -> None:
    prompt = random_tokens(1, 1100)[0][0].tolist()
    decoder = assert_greedy_is_full_recomputation(gpt, prompt, 90, horizon_eps)
    forgets = [kept[0] < 400 for kept in decoder.cache.kept_tokens()]
    assert forgets == [horizon_eps > 0.0] * 2


@pytest.mark.parametrize(
    "fields",
    [
        {"position_method": "rotary"},
        {"position_method": "sinusoidal", "bias": True},
        {"position_method": "learned", "max_position_embeddings": 64},
        {"position_method": "t5_bias", "tie_embeddings": False},
        {"position_method": "none", "num_attention_heads": 3},
        {"adaptive_cutoffs": (50, 150)},
    ],
    ids=lambda fields: next(iter(fields.values())),
)
def test_every_kind_of_model_generates(fields: dict[str, Any]) -> None:
    model = build_gpt(make_model(**fields)).eval()
    decoder = assert_greedy_is_full_recomputation(model, random_tokens(1, 40)[0][0].tolist(), 25, 2.0**-24)
    assert {kept for layer in decoder.cache.kept_tokens() for kept in layer} == {64}
    if fields.get("max_position_embeddings"):
        with pytest.raises(ConfigError, match="max_position_embeddings=64: must be at least 65"):
            decoder.feed([1])
        check_room(make_model(**fields), 40, 25)
        with pytest.raises(ConfigError, match="--max-tokens=26: must be at most 25: the prompt has 40 tokens"):
            check_room(make_model(**fields), 40, 26)


def test_a_token_that_the_tokenizer_does_not_have_is_never_chosen(gpt: GPT) -> None:
    texts = {}
    for num_tokens in (5, VOCAB_SIZE):
        sampler = Sampler(Sampling(seed=1))
        row = TextRow(Decoder(gpt), [1, 2, 3], sampler, max_tokens=20, num_tokens=num_tokens, end_of_document_id=-1)
        texts[num_tokens] = next(generate([row])).tokens
    assert max(texts[5]) < 5 <= max(texts[VOCAB_SIZE])


def plant_seeker(gpt: GPT) -> None:
    """Let the first layer's queries of SEEKER fit the key of SOUGHT alone: both are moved along one head direction."""
    weight = gpt.blocks[0].attention.qkv.weight.unflatten(0, (3, -1))  # type: ignore[union-attr,operator]
    embedding = gpt.embedding.weight
    first_row = gpt.layout.tensor.rank * len(embedding)
    with torch.no_grad():
        embedding[:, :2] = 0.0
        for token, column in ((SEEKER, 0), (SOUGHT, 1)):
            if first_row <= token < first_row + len(embedding):
                embedding[token - first_row, column] = 3.0
        weight[:2, :, :2] = 0.0
        weight[0, :, 0] = 4.0
        weight[1, :, 1] = 1.0


def generate_planted(group: Group = ALONE) -> tuple[Tensor, list[list[int]], int]:
    """Feed a text in which SOUGHT is long gone when SEEKER comes, a token at a time."""
    gpt = build_gpt(make_model(init_std=0.1), group).eval()
    plant_seeker(gpt)
    tokens = random_tokens(1, PLANTED_LENGTH, seed=3, vocab_size=VOCAB_SIZE - 20)[0][0] + 20  # neither of the two
    tokens[50], tokens[-10] = SOUGHT, SEEKER
    prompt, more = tokens[:PLANTED_PROMPT].tolist(), tokens[PLANTED_PROMPT:].tolist()
    decoder = Decoder(gpt)
    log_probs = [decoder.feed(prompt)]
    log_probs += [decoder.feed([token]) for token in more]
    together = [Decoder(gpt), Decoder(gpt)]  # and once more in a batch, of which this row alone is read again
    in_batch = [torch.stack([together[0].feed(prompt[:3]), together[1].feed(prompt)])]
    in_batch += [feed_each(together, [token, token]) for token in more]
    assert float((torch.stack(in_batch)[:, 1] - torch.stack(log_probs)).abs().max()) < LOG_PROB_ERROR
    assert [row.num_rebuilds for row in together] == [0, decoder.num_rebuilds]
    assert together[0].cache.num_tokens == 3 + len(more)
    if group.size == 1:
        full, _ = greedy_in_full(gpt, tokens.tolist(), PLANTED_PROMPT - 1)
        assert float((torch.stack(log_probs) - full).abs().max()) < LOG_PROB_ERROR
    return torch.stack(log_probs), decoder.cache.kept_tokens(), decoder.num_rebuilds


def generate_on_a_rank() -> tuple[Tensor, list[list[int]], int]:
    return generate_planted(tensor_group())


def test_a_query_of_huge_norm_rebuilds_the_cache_on_any_number_of_ranks() -> None:
    log_probs, kept, rebuilds = generate_planted()
    assert rebuilds == 1
    for size in (2, 4):
        by_rank = run_on_ranks(size, generate_on_a_rank)
        for of_rank, _, its_rebuilds in by_rank:
            assert float((of_rank - log_probs).abs().max()) < LOG_PROB_ERROR
            assert its_rebuilds == rebuilds
        kept_by_layer = [[n for _, its_kept, _ in by_rank for n in its_kept[layer]] for layer in range(len(kept))]
        assert kept_by_layer == kept
