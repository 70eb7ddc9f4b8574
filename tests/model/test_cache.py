"""The proven horizon of a cache, in fp64, where a share of 2^-24 can be seen."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from alibi_attention import alibi_slopes, attention
from megalibi.model.cache import CENTRE_TOKENS, LayerCache
from megalibi.model.positions import ScoreBias

HEADS, HEAD_DIM, LENGTH = 4, 16, 900
ROUNDING = 1e-12
"""Of fp64 sums in another order."""


def draw_layer(seed: int, *, key_offset: float = 0.0, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one row, [1, S, A, K]; the spread makes a few queries and keys longer than others."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, LENGTH, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64) for _ in "qkv")
    longer = 1.0 + (spread - 1.0) * torch.rand(2, LENGTH, 1, 1, generator=generator, dtype=torch.float64) ** 8
    return q * longer[0], k * longer[1] + key_offset, v


def stretches(*, prompt: int, chunk: int) -> Iterable[slice]:
    """A prompt in one pass, the rest in chunks."""
    yield slice(0, prompt)
    yield from (slice(start, min(start + chunk, LENGTH)) for start in range(prompt, LENGTH, chunk))


def lost_share(q: Tensor, k: Tensor, place: slice, kept: list[int]) -> float:
    """The largest share of a row's weights that stands on keys that are gone, by the equation."""
    scores = torch.einsum("qhk,thk->hqt", q[0, place], k[0, : place.stop]) * HEAD_DIM**-0.5
    distance = torch.arange(place.start, place.stop)[:, None] - torch.arange(place.stop)
    scores = (scores - alibi_slopes(HEADS).double()[:, None, None] * distance).masked_fill(distance < 0, -math.inf)
    weights = scores.softmax(-1)
    return max(float(weights[head, :, : place.stop - keeps].sum(-1).max()) for head, keeps in enumerate(kept))


@pytest.mark.parametrize(
    ("horizon_eps", "prompt", "chunk", "key_offset", "spread"),
    [(2.0**-24, 700, 1, 0.0, 1.0), (2.0**-8, 10, 3, 0.0, 3.0), (2.0**-4, 300, 90, 30.0, 1.0), (0.0, 100, 60, 0.0, 1.0)],
)
def test_forgotten_keys_hold_no_more_than_the_share(
    horizon_eps: float, prompt: int, chunk: int, key_offset: float, spread: float
) -> None:
    q, k, v = draw_layer(0, key_offset=key_offset, spread=spread)
    slopes, cache = alibi_slopes(HEADS), LayerCache(horizon_eps)
    full = attention(q, k, v, alibi_slopes=slopes, backend="reference")
    checked = 0
    for place in stretches(prompt=prompt, chunk=chunk):
        y = cache.attend(q[:, place], k[:, place], v[:, place], ScoreBias(slopes), backend="reference")
        if cache.has_failed:  # as a Decoder does: a query asked for more than any before, and all is run again
            cache.reset()
            seen = slice(0, place.stop)
            y = cache.attend(q[:, seen], k[:, seen], v[:, seen], ScoreBias(slopes), backend="reference")[:, place]
            assert not cache.has_failed
        kept = cache.kept_tokens()
        assert lost_share(q, k, place, kept) <= horizon_eps
        assert float((y - full[:, place]).abs().max()) <= 2 * horizon_eps * float(v.abs().max()) + ROUNDING
        checked += 1
        if checked % 20 == 1:
            cache.trim()
    assert checked > 2
    # Something must have gone, or nothing was tested; the flattest head sees everything at this length.
    assert (kept[0] < LENGTH // 2) == (horizon_eps > 0.0)
    assert cache.memory_bytes() >= 2 * sum(kept) * HEAD_DIM * 8


def test_what_all_keys_have_in_common_costs_nothing() -> None:
    kept = []
    for key_offset in (0.0, 100.0):
        q, k, v = draw_layer(1, key_offset=key_offset)
        cache = LayerCache(2.0**-24)
        for place in stretches(prompt=500, chunk=200):
            cache.attend(q[:, place], k[:, place], v[:, place], ScoreBias(alibi_slopes(HEADS)), backend="reference")
        cache.trim()
        kept.append(cache.kept_tokens())
    assert kept[0] == kept[1]
    assert kept[0][0] < LENGTH // 2


def test_a_query_that_needs_a_forgotten_key_is_noticed() -> None:
    """A key of huge norm is seen by nobody until, long after it is gone, a query of huge norm comes."""
    q, k, v = draw_layer(2)
    slopes = alibi_slopes(HEADS)
    k[0, 100] *= 2.0
    cache = LayerCache(2.0**-24)
    for place in stretches(prompt=600, chunk=1):
        if place.start == 800:
            q[0, place] = 60.0 * k[0, 100]
        cache.attend(q[:, place], k[:, place], v[:, place], ScoreBias(slopes), backend="reference")
        if place.start == 800:
            break
        assert not cache.has_failed
        if place.start % 100 == 0:
            cache.trim()
    assert lost_share(q, k, place, cache.kept_tokens()) > 0.9
    assert cache.has_failed
    cache.reset()
    assert not cache.has_failed
    y = cache.attend(*(x[:, : place.stop] for x in (q, k, v)), ScoreBias(slopes), backend="reference")
    full = attention(*(x[:, : place.stop] for x in (q, k, v)), alibi_slopes=slopes, backend="reference")
    assert float((y - full).abs().max()) <= ROUNDING
    cache.trim()
    assert lost_share(q, k, place, cache.kept_tokens()) <= 2.0**-24  # it has learned how far queries look


def test_what_is_not_a_number_is_never_proven() -> None:
    q, k, v = draw_layer(3)
    bias, cache = ScoreBias(alibi_slopes(HEADS)), LayerCache(2.0**-24)
    cache.attend(q[:, :600], k[:, :600], v[:, :600], bias, backend="reference")
    cache.trim()
    assert cache.kept_tokens()[0] < 600
    q[0, 600] = math.nan
    cache.attend(q[:, 600:601], k[:, 600:601], v[:, 600:601], bias, backend="reference")
    assert cache.has_failed
    cache.reset()
    for place in (slice(0, 600), slice(600, 601), slice(601, LENGTH)):
        cache.attend(q[:, place], k[:, place], v[:, place], bias, backend="reference")
    assert not cache.has_failed
    assert cache.kept_tokens() == [LENGTH] * HEADS


def test_the_first_keys_are_all_kept() -> None:
    q, k, v = draw_layer(4)
    cache = LayerCache(2.0**-1)
    for place in (slice(i, i + 1) for i in range(CENTRE_TOKENS)):
        cache.attend(q[:, place], k[:, place], v[:, place], ScoreBias(alibi_slopes(HEADS)), backend="reference")
        cache.trim()
        if place.stop < CENTRE_TOKENS:
            assert cache.kept_tokens() == [place.stop] * HEADS
