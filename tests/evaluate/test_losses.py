from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megalibi.config import padded_vocab_size
from megalibi.data.dataset import open_dataset
from megalibi.data.loader import ValidationLoader
from megalibi.data.tokens.token_file import TokenFile
from megalibi.evaluate.losses import FORWARD_TOKENS, Window, batches_of_windows, stream_loss, validation_loss, windows
from megalibi.model import GPT, initialize
from megalibi.parallel import ALONE, Group, Layout, ProcessGroups
from tests.support.ranks import run_on_ranks
from tests.support.runs import CPU, VOCAB_SIZE, make_config, process_groups

FP32_RELATIVE_BOUND = 1e-5
FP64_RELATIVE_BOUND = 1e-13
"""Of sums of the same fp32 losses in another order, at most 40,000 of them."""


def context_of(token: int, num_tokens: int, length: int, stride: int | None) -> int:
    """First token that the prediction of a token sees, by the protocol's definition."""
    if stride is None:
        return (token - 1) // length * length  # its block's first
    if token <= length:
        return 0  # the first window
    number = -(-(token - length) // stride)  # the first window that reaches it; each scores what is new to it
    stop = min(length + number * stride, num_tokens - 1)
    return stop - length


@given(st.data())
def test_every_token_but_the_first_is_scored_once_with_its_context(data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(2, 70), "num_tokens")
    length = data.draw(st.integers(1, 80), "length")
    stride = data.draw(st.one_of(st.none(), st.integers(1, length - 1)) if length > 1 else st.none(), "stride")
    scored = []
    for window in windows(num_tokens, length, stride):
        assert 0 <= window.start < window.scored_from <= window.stop <= num_tokens - 1
        assert window.stop - window.start <= length
        for token in range(window.scored_from, window.stop + 1):
            assert window.start == context_of(token, num_tokens, length, stride)
            scored.append(token)
    assert scored == list(range(1, num_tokens))


@given(num_tokens=st.integers(2, 70), length=st.integers(1, 80))
def test_stride_of_the_length_is_nonoverlapping(num_tokens: int, length: int) -> None:
    assert list(windows(num_tokens, length, length)) == list(windows(num_tokens, length))


@given(num_tokens=st.integers(2, 70), length=st.integers(1, 20), stride=st.integers(1, 20))
def test_batches_hold_all_windows_in_order_and_only_like_ones_together(
    num_tokens: int, length: int, stride: int
) -> None:
    stride = min(stride, length)
    batches = list(batches_of_windows(num_tokens, length, stride))
    assert [window for batch in batches for window in batch] == list(windows(num_tokens, length, stride))
    for batch in batches:
        assert len({(window.stop - window.start, window.scored_from - window.start) for window in batch}) == 1
        assert len(batch) * length <= FORWARD_TOKENS


def test_two_protocols_on_ten_tokens() -> None:
    assert list(windows(10, 4)) == [
        Window(start=0, stop=4, scored_from=1),
        Window(start=4, stop=8, scored_from=5),
        Window(start=8, stop=9, scored_from=9),
    ]
    assert list(windows(10, 4, 2)) == [
        Window(start=0, stop=4, scored_from=1),
        Window(start=2, stop=6, scored_from=5),
        Window(start=4, stop=8, scored_from=7),
        Window(start=5, stop=9, scored_from=9),
    ]


def build_model(prefix: str, group: Group = ALONE) -> GPT:
    config = make_config(prefix)
    model = GPT(config.model, padded_vocab_size=padded_vocab_size(VOCAB_SIZE, group.size), layout=Layout(group))
    initialize(model, seed=5, group=group)
    return model


@torch.no_grad()
def sums_one_by_one(model: GPT, tokens: TokenFile, length: int, stride: int | None, num_tokens: int) -> Tensor:
    """Give each token the context that the definition gives it, alone; sum by how many tokens that is."""
    stream = torch.from_numpy(tokens.read(0, num_tokens).astype("int64"))
    sums_2S = torch.zeros(2, length, dtype=torch.float64)
    for token in range(1, num_tokens):
        start = context_of(token, num_tokens, length, stride)
        loss = model(stream[None, start:token], stream[None, start + 1 : token + 1])[0, -1].double()
        sums_2S[:, token - start - 1] += torch.stack([loss, torch.ones_like(loss)])
    return sums_2S


def sums_of(
    model: GPT, tokens: TokenFile, case: tuple[int, int | None, int], groups: ProcessGroups | None = None
) -> Tensor:
    turns = stream_loss(model, tokens, *case, device=CPU, data=ALONE if groups is None else groups.data)
    return torch.stack(list(turns)).sum(0)


def assert_same(sums_2S: Tensor, expected_2S: Tensor, bound: float) -> None:
    """The counts are the same, and the losses of every position as near as the bound, relative."""
    assert torch.equal(sums_2S[1], expected_2S[1])
    torch.testing.assert_close(sums_2S[0], expected_2S[0], rtol=bound, atol=0.0)


@pytest.mark.parametrize(
    ("length", "stride", "num_tokens"),
    [
        (16, None, 97),  # blocks that fill the text
        (16, None, 92),  # and a last one of 11
        (16, None, 98),  # and a last one of 1
        (16, 5, 97),
        (16, 5, 83),
        (16, 1, 97),
        (16, 15, 60),
        (200, None, 97),  # longer than the text
        (200, 7, 97),
        (7, 3, 50),
        (1, None, 20),
    ],
)
def test_both_protocols_equal_token_by_token(prefix: str, length: int, stride: int | None, num_tokens: int) -> None:
    model, tokens = build_model(prefix), TokenFile(prefix)
    sums_2S = sums_of(model, tokens, (length, stride, num_tokens))
    assert sums_2S[1].sum() == num_tokens - 1
    assert_same(sums_2S, sums_one_by_one(model, tokens, length, stride, num_tokens), FP32_RELATIVE_BOUND)


@pytest.mark.parametrize(("length", "num_tokens"), [(16, 97), (16, 92), (7, 50), (200, 97)])
def test_a_stride_of_the_length_gives_the_nonoverlapping_losses_exactly(
    prefix: str, length: int, num_tokens: int
) -> None:
    model, tokens = build_model(prefix), TokenFile(prefix)
    expected_2S = sums_of(model, tokens, (length, None, num_tokens))
    assert torch.equal(sums_of(model, tokens, (length, length, num_tokens)), expected_2S)


# Several forward passes, a last short one, and turns that leave a rank without one.
CASES: list[tuple[int, int | None, int]] = [(64, None, 20_001), (64, None, 33_000), (48, 31, 17_000), (500, 100, 2_000)]


def _sums_on_ranks(prefix: str, tensor_parallel_size: int) -> list[Tensor]:
    groups = process_groups(tensor_parallel_size)
    model, tokens = build_model(prefix, groups.tensor), TokenFile(prefix)
    return [sums_of(model, tokens, case, groups) for case in CASES]


@pytest.mark.parametrize(("world_size", "tensor"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_any_number_of_ranks_gives_the_losses_of_one(prefix: str, world_size: int, tensor: int) -> None:
    model, tokens = build_model(prefix), TokenFile(prefix)
    torch.set_num_threads(1)  # as in the ranks: the sums of a matrix product depend on it
    by_rank = run_on_ranks(world_size, _sums_on_ranks, prefix, tensor)
    for number, case in enumerate(CASES):
        expected_2S = sums_of(model, tokens, case)
        for sums in by_rank:
            assert torch.equal(sums[number], by_rank[0][number])
            assert_same(sums[number], expected_2S, FP64_RELATIVE_BOUND if tensor == 1 else FP32_RELATIVE_BOUND)


def _validate(prefix: str, num_samples: int, micro_batch_sizes: list[int]) -> list[tuple[float, int]]:
    groups = process_groups(1)
    model = build_model(prefix)
    results = []
    for micro_batch_size in micro_batch_sizes:
        loader = ValidationLoader(
            open_dataset([(prefix, 1.0)], seq_length=33, seed=1, vocab_size=VOCAB_SIZE),
            num_samples=num_samples,
            micro_batch_size=micro_batch_size,
            data_rank=groups.data.rank,
            data_size=groups.data.size,
        )
        results.append(validation_loss(model, loader, groups=groups, device=CPU))
    return results


def test_validation_loss_does_not_depend_on_ranks_and_micro_batch(prefix: str) -> None:
    num_samples = 7  # which neither 2 ranks nor micro batches of 2 or 3 divide
    by_world = [run_on_ranks(world, _validate, prefix, num_samples, [1, 2, 3]) for world in (1, 2)]
    results = [result for ranks in by_world for rank in ranks for result in rank]
    assert {tokens for _, tokens in results} == {num_samples * 33}
    for loss, _ in results:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
    assert by_world[1][0] == by_world[1][1]
