from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from alibi_attention.bench import timing as benchmark
from alibi_attention.bench.timing import (
    PLAIN,
    Case,
    find_contestants,
    make_case_inputs,
    measure_call_memory,
    measure_times,
)
from tests.support.device import DEVICE, ON_GPU

CASE = Case(device="cpu", dtype="float32", batch=1, length=48, num_heads=2, head_dim=16, mode="forward")
SCORES_BYTES = 4 * 2 * 1024**2  # fp32, two heads, 1,024 tokens


def test_flop_by_the_formula():
    assert CASE.flop == 4 * 2 * 48 * 48 * 16 / 2
    assert replace(CASE, mode="forward_backward", batch=3).flop == 3.5 * 3 * CASE.flop


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_contestants_are_timed_in_turns_and_compared_within_a_turn(mode):
    case = replace(CASE, mode=mode)
    figures = measure_times(case, ["sdpa", "reference", "flex"], repeats=3)
    assert figures["flex"] == {"skipped": "it does not run on cpu"}
    plain = figures[PLAIN]["seconds"]["repeats"]
    for name in (PLAIN, "sdpa", "reference"):
        seconds, ratio = figures[name]["seconds"], figures[name]["ratio_to_plain"]
        assert len(seconds["repeats"]) == 3
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
        assert ratio["repeats"] == [ours / theirs for ours, theirs in zip(seconds["repeats"], plain, strict=True)]
        assert figures[name]["tflops_per_second"] == pytest.approx(case.flop / seconds["median"] / 1e12)


def test_one_repeat_has_no_spread():
    seconds = measure_times(CASE, [], repeats=1)[PLAIN]["seconds"]
    assert seconds["low"] == seconds["median"] == seconds["high"]


def test_what_would_not_fit_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(benchmark, "_available_bytes", lambda: 1000)
    figures = measure_times(CASE, ["sdpa", "reference", "unfused"], repeats=1)
    for name in ("reference", "unfused"):
        assert "GB of S x S matrices, with 0 GB free" in figures[name]["skipped"]
    assert "seconds" in figures["sdpa"]


def test_a_contestant_that_fails_is_left_out_with_its_error(monkeypatch):
    def fail(q, slopes):
        raise RuntimeError("out of\nmemory")

    contestants = find_contestants("cpu", "float32", 16)
    broken = {**contestants, "sdpa": replace(contestants["sdpa"], build=fail)}
    monkeypatch.setattr(benchmark, "find_contestants", lambda *_: broken)
    assert measure_times(CASE, ["sdpa"], repeats=1)["sdpa"] == {"skipped": "out of memory"}


def test_memory_counts_what_is_s_by_s():
    case = replace(CASE, length=1024, mode="forward_backward")
    assert measure_call_memory(case, "reference") > 2 * SCORES_BYTES  # the weights and their gradient, at least
    assert SCORES_BYTES <= measure_call_memory(case, "sdpa_dense") < 2 * SCORES_BYTES  # the bias
    assert 0 < measure_call_memory(case, "sdpa") < SCORES_BYTES


def test_a_trained_models_q_and_k_are_what_is_timed(tmp_path):
    q, k = torch.randn(2, 1, 60, 2, 16)
    torch.save({"q": q.bfloat16(), "k": k.bfloat16()}, tmp_path / "qk.pt")
    case = replace(CASE, batch=2, qk=str(tmp_path / "qk.pt"))
    inputs = make_case_inputs(case)
    assert torch.equal(inputs[0], q[:, :48].bfloat16().float().expand(2, -1, -1, -1))
    assert torch.equal(inputs[1], k[:, :48].bfloat16().float().expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="holds 60 tokens, 2 heads of 16, not 61 tokens, 2 heads of 16"):
        make_case_inputs(replace(case, length=61))
    (tmp_path / "qk.pt").write_text("no tensors")
    with pytest.raises(ValueError, match="cannot be read as q and k"):
        make_case_inputs(case)


def test_what_an_interpreter_runs_takes_part_by_name_alone():
    by_name_alone = {
        name for name, contestant in find_contestants("cpu", "float16", 16).items() if contestant.by_name_alone
    }
    assert {"flash", "triton"} <= by_name_alone
    assert not by_name_alone & {PLAIN, "sdpa", "reference", "sdpa_dense"}


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="a graph is captured by CUDA")
@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_a_captured_graph_is_timed(mode):
    case = replace(CASE, device=DEVICE, dtype="bfloat16", head_dim=64, mode=mode, cuda_graph=True)
    figures = measure_times(case, ["triton"], repeats=2)
    for name in (PLAIN, "triton"):
        assert figures[name]["seconds"]["median"] > 0, figures[name]
