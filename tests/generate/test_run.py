from __future__ import annotations

from typing import Any

import pytest
import torch

from megalibi.generate.decoder import Decoder
from megalibi.generate.run import TextRow, generate
from megalibi.generate.sampling import Sampling
from megalibi.model import GPT
from tests.generate.test_decoder import GREEDY, LOG_PROB_ERROR, RecordingSampler
from tests.support.models import VOCAB_SIZE, build_gpt, make_model, random_tokens
from tests.support.ranks import run_on_ranks
from tests.support.tensors import tensor_group

MAX_TOKENS = 12
LENGTHS = [5, 40, 1, 23, 12]
LONG_LENGTHS = [600, 9, 70, 420, 300]
"""Prompts of which heads with ALiBi keep different numbers of tokens, in each row others."""
BOUNDED = 2.0**-24


def write(
    gpt: GPT, lengths: list[int], batch_size: int, sampling: Sampling, eps: float, end: int
) -> dict[int, dict[str, Any]]:
    """What is compared of the texts after prompts of these lengths, by number, in the order in which they ended."""
    prompts = random_tokens(len(lengths), max(lengths))[0].tolist()
    samplers = [RecordingSampler(sampling, number) for number in range(len(lengths))]
    rows = (
        TextRow(
            Decoder(gpt, horizon_eps=eps),
            prompts[sampler.number][: lengths[sampler.number]],
            sampler,
            max_tokens=MAX_TOKENS,
            num_tokens=VOCAB_SIZE,
            end_of_document_id=end,
        )
        for sampler in samplers
    )
    return {
        row.sampler.number: {
            "tokens": row.tokens,
            "ended": row.ended,
            "kept": row.decoder.cache.kept_tokens(),
            "log_probs": torch.stack(samplers[row.sampler.number].seen),
        }
        for row in generate(rows, batch_size=batch_size)
    }


def assert_same(texts: dict[int, dict[str, Any]], texts_ref: dict[int, dict[str, Any]]) -> None:
    assert sorted(texts) == sorted(texts_ref)
    for number, text in texts.items():
        text_ref = texts_ref[number]
        assert (text["tokens"], text["ended"]) == (text_ref["tokens"], text_ref["ended"])
        assert float((text["log_probs"] - text_ref["log_probs"]).abs().max()) < LOG_PROB_ERROR


@pytest.mark.parametrize(
    ("fields", "lengths", "eps"),
    [
        ({"position_method": "alibi"}, LONG_LENGTHS, BOUNDED),
        ({"bias": True}, LENGTHS, 0.0),
        ({"position_method": "rotary"}, LENGTHS, BOUNDED),
        ({"position_method": "sinusoidal"}, LENGTHS, BOUNDED),
        ({"position_method": "learned", "max_position_embeddings": max(LENGTHS) + MAX_TOKENS - 1}, LENGTHS, BOUNDED),
        ({"position_method": "t5_bias", "tie_embeddings": False}, LENGTHS, BOUNDED),
        ({"adaptive_cutoffs": (50, 150)}, LENGTHS, BOUNDED),
    ],
)
def test_texts_that_grow_together_are_those_that_grow_alone(
    fields: dict[str, Any], lengths: list[int], eps: float
) -> None:
    gpt = build_gpt(make_model(**fields)).eval()
    end = write(gpt, lengths[:2], 1, GREEDY, eps, -1)[1]["tokens"][3]  # the second text ends early
    alone = write(gpt, lengths, 1, GREEDY, eps, end)
    together = write(gpt, lengths, 3, GREEDY, eps, end)
    assert_same(together, alone)
    assert list(alone) == [0, 1, 2, 3, 4] != list(together)  # the second one ended before the first
    assert alone[1]["ended"]
    assert all(text["ended"] or len(text["tokens"]) == MAX_TOKENS for text in alone.values())
    for number, text in together.items():
        assert text["kept"] == alone[number]["kept"]
        assert (min(text["kept"][0]) < lengths[number]) == (lengths[number] >= 300)


def write_on_a_rank(lengths: list[int], sampling: Sampling, end: int) -> dict[int, dict[str, Any]]:
    return write(build_gpt(make_model(), tensor_group()).eval(), lengths, 2, sampling, BOUNDED, end)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=3)], ids=["greedy", "drawn"])
def test_texts_do_not_depend_on_the_size_of_the_batch_or_the_ranks(sampling: Sampling) -> None:
    gpt = build_gpt(make_model()).eval()
    end = write(gpt, LONG_LENGTHS[:2], 1, sampling, BOUNDED, -1)[1]["tokens"][3]
    alone = write(gpt, LONG_LENGTHS, 1, sampling, BOUNDED, end)
    assert_same(write(gpt, LONG_LENGTHS, 8, sampling, BOUNDED, end), alone)
    for texts in run_on_ranks(2, write_on_a_rank, LONG_LENGTHS, sampling, end):
        assert_same(texts, alone)
