from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalibi.config import derive
from megalibi.data.dataset import open_dataset
from megalibi.data.loader import ValidationLoader
from megalibi.data.token_file import TokenFile
from megalibi.engine.evaluate import FORWARD_TOKENS, Window, batches_of_windows, stream_loss, validation_loss, windows
from megalibi.model import GPT, initialize
from megalibi.parallel import ALONE
from tests.engine.runs import CPU, VOCAB_SIZE, make_config, process_groups
from tests.ranks import run_on_ranks

FP32_RELATIVE_BOUND = 1e-5


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


def build_model(prefix: str) -> GPT:
    config = make_config(prefix)
    model = GPT(config.model, padded_vocab_size=derive(config, 1).padded_vocab_size, group=ALONE)
    initialize(model, config.model, seed=5, group=ALONE)
    return model


@pytest.mark.parametrize(("length", "stride"), [(16, None), (16, 5), (16, 1), (16, 16), (200, None), (7, 3)])
def test_stream_loss_equals_token_by_token(prefix: str, length: int, stride: int | None) -> None:
    model, tokens, num_tokens = build_model(prefix), TokenFile(prefix), 97
    stream = torch.from_numpy(tokens.read(0, num_tokens).astype("int64"))
    expected = 0.0
    for token in range(1, num_tokens):
        start = context_of(token, num_tokens, length, None if stride == length else stride)
        with torch.no_grad():
            expected += model(stream[None, start:token], stream[None, start + 1 : token + 1])[0, -1].item()
    parts = list(stream_loss(model, tokens, length, stride, num_tokens, device=CPU))
    assert sum(count for _, count in parts) == num_tokens - 1
    assert sum(loss for loss, _ in parts) == pytest.approx(expected, rel=FP32_RELATIVE_BOUND)


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
