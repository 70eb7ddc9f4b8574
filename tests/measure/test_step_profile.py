"""What the events of a profile add up to, and the work of the parts of a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from megalibi.config import derive
from megalibi.measure.step_parts import ACCUMULATION, ATTENTION, FORWARD_RANGE, MATMUL, OPTIMIZER, OTHER, RESIDUAL
from megalibi.measure.step_profile import _device_times, _kernels_of, count_work, summarize_profile
from megalibi.model import model_flops_per_token
from tests.support.steps import make_config

ADD = "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16> >"


def event(number: int, name: str, start: float, end: float, **more: Any) -> FunctionEvent:
    return FunctionEvent(number, name, 0, start, end, use_device="cuda", **more)


def on_device(number: int, name: str, start: float, end: float, **more: Any) -> FunctionEvent:
    return event(number, name, start, end, device_type=DeviceType.CUDA, **more)


@pytest.fixture
def events() -> EventList:
    """A step: an addition that launches a kernel, one that nobody launched, and the shadow of a range."""
    forward = event(1, FORWARD_RANGE, 0, 100, is_user_annotation=True)
    add = event(2, "aten::add", 10, 20)
    add.append_kernel(ADD, 0, 30)
    events = [
        forward,
        add,
        on_device(3, FORWARD_RANGE, 15, 400, is_user_annotation=True),
        on_device(4, ADD, 20, 50),
        on_device(5, "nvjet_sm90", 40, 90),
        on_device(6, "Memset (Device)", 190, 200),
    ]
    found = EventList(events, use_device="cuda")
    found._build_tree()
    return found


def test_kernels_are_counted_once_and_ranges_are_none(events: EventList) -> None:
    slices = {(piece.name, piece.seconds, piece.path) for piece in _kernels_of(events)}
    assert slices == {
        (ADD, 30e-6, ("aten::add", FORWARD_RANGE)),
        ("nvjet_sm90", 50e-6, ()),
        ("Memset (Device)", 10e-6, ()),
    }


def test_busy_time_counts_overlaps_once(events: EventList) -> None:
    span, busy = _device_times(events)
    assert (span, busy) == pytest.approx((180e-6, 80e-6))


def test_a_summary_adds_up(events: EventList) -> None:
    summary = summarize_profile(_kernels_of(events), *_device_times(events))
    assert summary["parts_milliseconds"][RESIDUAL] == pytest.approx(0.03)
    assert summary["parts_milliseconds"][MATMUL] == pytest.approx(0.05)
    assert summary["parts_milliseconds"][OTHER] == pytest.approx(0.01)
    assert [kernel["name"] for kernel in summary["kernels"]] == ["nvjet_sm90", ADD, "Memset (Device)"]
    assert summary["span_milliseconds"] == pytest.approx(0.18)


def test_the_work_of_the_parts_is_the_models() -> None:
    config = make_config()
    derived = derive(config, 1)
    work = count_work(config, derived)
    padded = dataclasses.replace(config.model, vocab_size=derived.padded_vocab_size)
    length, tokens = config.data.seq_length, derived.batch_tokens
    causal, full = (model_flops_per_token(padded, length, causal=causal) * tokens for causal in (True, False))
    # Of attention a model's FLOP count six products, and a fused kernel makes seven: the scores again, backward.
    of_attention = (full - causal) / (length - (length + 1) / 2) * (length + 1) / 2
    assert sum(part.flops for part in work.values()) == pytest.approx(causal + of_attention / 6)
    assert work[ATTENTION].flops == pytest.approx(14 * 2 * 256 * (256 + 1) / 2 * derived.batch_tokens)


def test_two_ranks_share_the_optimizer_under_zero_alone() -> None:
    config = make_config(train={"global_batch_size": 2})
    one, two = (count_work(config, derive(config, ranks)) for ranks in (1, 2))
    assert two[OPTIMIZER].bytes == one[OPTIMIZER].bytes / 2
    assert two[ACCUMULATION].bytes == one[ACCUMULATION].bytes / 2  # half of the micro batches
    plain = dataclasses.replace(config, zero=dataclasses.replace(config.zero, stage=0))
    assert count_work(plain, derive(plain, 2))[OPTIMIZER] == count_work(plain, derive(plain, 1))[OPTIMIZER]
