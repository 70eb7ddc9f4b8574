"""The whole model with the kernels of fused_ops and without: the same losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_ops import fusing
from tests.support.device import DEVICE
from tests.support.models import build_gpt, losses_and_grads, make_model
from tests.support.ranks import run_on_ranks
from tests.support.tensors import relative_error, tensor_group

FP32_RELATIVE_ERROR = 1e-5
"""Of the losses and of each gradient, by the norm."""
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases, embedding norm, dropout, recomputed": {
        "bias": True, "embedding_norm": True, "dropout": 0.1, "attention_dropout": 0.0, "recompute": "full",
    },
    "adaptive, no final norm": {"adaptive_cutoffs": (100, 200), "final_norm": False},
}  # fmt: skip


def _errors(fields: dict[str, Any], parallel: dict[str, Any]) -> dict[str, float]:
    results: list[dict[str, Tensor]] = []
    for fused in (False, True):
        gpt = build_gpt(make_model(**fields), **parallel).to(DEVICE)
        with fusing(fused):
            results.append(losses_and_grads(gpt, micro_batch_key=5))
    plain, with_kernels = results
    assert plain.keys() == with_kernels.keys()
    return {name: relative_error(with_kernels[name], plain[name]) for name in plain}


def _errors_on_rank(sequence_parallel: bool) -> dict[str, dict[str, float]]:
    parallel = {"group": tensor_group(), "sequence_parallel": sequence_parallel}
    return {name: _errors(fields, parallel) for name, fields in MODELS.items()}


def check(errors: dict[str, dict[str, float]]) -> None:
    for model, by_name in errors.items():
        for name, error in by_name.items():
            assert error <= FP32_RELATIVE_ERROR, f"{model}, {name}: {error:.2e}"
    assert any(error > 0 for by_name in errors.values() for error in by_name.values()), "nothing was fused"


@pytest.mark.gpu
def test_alone() -> None:
    check({name: _errors(fields, {}) for name, fields in MODELS.items()})


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel(sequence_parallel: bool) -> None:
    for errors in run_on_ranks(2, _errors_on_rank, sequence_parallel):
        check(errors)


@pytest.mark.gpu
def test_bf16_losses_are_as_close_to_fp32_as_without() -> None:
    gpt = build_gpt(make_model(hidden_size=64, bias=True)).to(DEVICE)
    tokens = torch.randint(301, (2, 33), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    losses = {}
    for dtype, fused in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        gpt.compute_dtype = dtype
        with fusing(fused), torch.no_grad():
            losses[dtype, fused] = gpt(tokens[:, :-1], tokens[:, 1:])
    exact, plain, with_kernels = losses.values()
    assert relative_error(with_kernels, exact) <= 2 * relative_error(plain, exact)
