from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.models import FP32_RELATIVE_ERROR, VOCAB_SIZE, build_gpt, make_model, random_tokens
from tests.support.ranks import run_on_ranks
from tests.support.tensors import assert_close, tensor_group

VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": False, "bias": True},
    {"adaptive_cutoffs": (50, 150)},
]


def _log_probs(sequence_parallel: bool) -> list[Tensor]:
    tokens, _ = random_tokens(2, 12)
    models = (
        build_gpt(make_model(**fields), tensor_group(), sequence_parallel=sequence_parallel) for fields in VARIANTS
    )
    return [model.log_probs(tokens) for model in models]


@pytest.mark.parametrize("fields", VARIANTS)
def test_log_probs_are_those_of_the_losses(fields: dict[str, Any]) -> None:
    model = build_gpt(make_model(**fields))
    tokens, labels = random_tokens(2, 12)
    log_probs = model.log_probs(tokens)
    assert log_probs.shape == (2, 12, VOCAB_SIZE)
    assert log_probs.dtype == torch.float32
    assert_close(log_probs.exp().sum(-1), torch.ones(2, 12), FP32_RELATIVE_ERROR, "sum")
    scored = labels >= 0
    of_labels = log_probs.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    assert_close(of_labels[scored], -model(tokens, labels)[scored], FP32_RELATIVE_ERROR, "loss")
    # Matrix products of other shapes, whose last bits differ on some processors.
    assert_close(model.log_probs(tokens, first=5), log_probs[:, 5:], FP32_RELATIVE_ERROR, "from the sixth on")


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_tensor_group_has_the_log_probs_of_one_rank(sequence_parallel: bool) -> None:
    tokens, _ = random_tokens(2, 12)
    for by_variant in run_on_ranks(2, _log_probs, sequence_parallel):
        for fields, log_probs in zip(VARIANTS, by_variant, strict=True):
            assert_close(log_probs, build_gpt(make_model(**fields)).log_probs(tokens), FP32_RELATIVE_ERROR, str(fields))
