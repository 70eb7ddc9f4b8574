from __future__ import annotations

import pytest
import torch

from alibi_attention import alibi_slopes
from alibi_attention.bench.pruning import count_kept_pairs
from tests.alibi_attention.every_backend.horizon_inputs import INPUTS, SLOPES


def count_slowly(q, k, slopes, eps):
    """Every pair by itself, in fp64: causal, by their threshold, and as few as the weights allow."""
    length, scale = q.shape[1], q.shape[-1] ** -0.5
    counts = torch.zeros(3, len(slopes), dtype=torch.int64)
    for row in range(len(q)):
        for head, slope in enumerate(slopes.tolist()):
            q_SK, k_SK = q[row, :, head].double(), k[row, :, head].double()
            largest = scale * max(x.norm().item() for x in q_SK) * max(x.norm().item() for x in k_SK)
            threshold = torch.log(torch.tensor(eps / length, dtype=torch.float64)) - 2 * largest
            for i in range(length):
                decay = -slope * (i - torch.arange(i + 1).double())
                weights = (scale * k_SK[: i + 1] @ q_SK[i] + decay).softmax(0)
                shares = [weights[:gone].sum().item() for gone in range(i + 1)]
                fewest = i + 1 - max(gone for gone, share in enumerate(shares) if share <= eps)
                counts[:, head] += torch.tensor([i + 1, (decay >= threshold).sum(), fewest])
    return counts.tolist()


@pytest.mark.parametrize("eps", [2.0**-24, 1e-3])
def test_pairs_are_those_that_are_found_one_by_one(eps):
    q, k = torch.randn(2, 2, 60, 3, 8, generator=torch.Generator().manual_seed(0))
    slopes = torch.tensor([4.0, 2.0, 2.0**-8])
    kept = count_kept_pairs(q, k, slopes, horizon_eps=eps)
    assert [kept.causal, kept.threshold, kept.needed] == count_slowly(q, k, slopes, eps)
    assert kept.needed[0] < kept.query_horizon[0] < kept.head_horizon[0] < kept.threshold[0] < kept.causal[0]
    assert kept.threshold[2] == kept.head_horizon[2] == kept.causal[2]


@pytest.mark.parametrize("eps", [2.0**-24, 1e-3, 0.5])
@pytest.mark.parametrize("inputs", INPUTS)
def test_the_horizon_keeps_no_pair_that_their_threshold_leaves_out(inputs, eps):
    q, k = INPUTS[inputs](300)
    # A distance of ours is rounded up where theirs is rounded down: one pair more for each query.
    kept = count_kept_pairs(q, k, SLOPES, horizon_eps=eps)
    for needed, by_query, by_head, theirs in zip(
        kept.needed, kept.query_horizon, kept.head_horizon, kept.threshold, strict=True
    ):
        assert needed <= by_query <= by_head <= theirs + len(q) * 300


def test_on_normal_inputs_the_horizon_keeps_less():
    q, k = torch.randn(2, 1, 1024, 8, 32, generator=torch.Generator().manual_seed(0))
    kept = count_kept_pairs(q, k, alibi_slopes(8), horizon_eps=2.0**-24)
    for by_query, by_head, theirs in zip(kept.query_horizon[:4], kept.head_horizon, kept.threshold, strict=False):
        assert by_query < by_head < 0.85 * theirs
