"""The estimate of a step's time: rates, times and what comes after the gradient, by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megalibi.config import derive
from megalibi.errors import ConfigError
from megalibi.model import model_flops_per_token
from megalibi.plan.gpus import Gpu
from megalibi.plan.roofline import Rates, Roofline, count_after_gradients, estimate, parse_rates
from megalibi.plan.run_plan import plan_run
from megalibi.plan.work_trace import PRODUCTS
from tests.support.steps import make_config

GPU = Gpu(name="test", memory_bytes=1 << 34, peak_flops_per_second=1e12, memory_bytes_per_second=1e11,
          link_bytes_per_second=1e9, source="nowhere")  # fmt: skip
RATES = Rates(matmul=0.5, attention=0.25, memory=0.8, link=0.1)
BATCHES, BATCH, LENGTH = 4, 2, 64


def estimate_of(ranks: int = 1, attention: str = "fused", **sections: dict[str, object]) -> Roofline:
    train = {"micro_batch_size": BATCH, "global_batch_size": BATCH * BATCHES * ranks}
    config = make_config(**{"data": {"seq_length": LENGTH}, "zero": {"stage": 1}, "train": train} | sections)
    return estimate(config, plan_run(config, ranks, attention=attention), GPU, RATES)


def test_a_part_takes_as_long_as_its_slower_side() -> None:
    roofline = estimate_of()
    by_name = {part.name: part for part in roofline.parts}
    assert {part.bound_by for part in roofline.parts} == {"arithmetic", "memory"}
    for part in roofline.parts:
        share = RATES.attention if part.name == "attention" else RATES.matmul
        sides = {"arithmetic": part.flops / (share * 1e12), "memory": part.bytes / (0.8 * 1e11)}
        assert part.seconds == max(sides.values()) == sides[part.bound_by]
    assert by_name["logits"].bound_by == "arithmetic"
    assert {by_name[name].bound_by for name in ("cross entropy", "layer norm", "residual add")} == {"memory"}
    assert [part.seconds for part in roofline.parts] == sorted((part.seconds for part in roofline.parts), reverse=True)


def test_totals_by_hand() -> None:
    roofline = estimate_of()
    seconds = sum(part.seconds for part in roofline.parts)
    assert roofline.seconds == seconds
    assert roofline.tokens_per_second == BATCH * LENGTH / seconds
    model = make_config().model
    for causal in (True, False):
        flops = BATCH * LENGTH * model_flops_per_token(model, LENGTH, causal=causal)
        assert roofline.mfu(causal=causal) == pytest.approx(flops / seconds / 1e12)
    assert roofline.mfu(causal=True) < roofline.mfu(causal=False) < RATES.matmul


def test_data_ranks_add_communication_and_tokens() -> None:
    alone, two = estimate_of(), estimate_of(ranks=2)
    (communication,) = (part for part in two.parts if part.name == "communication")
    config = make_config(zero={"stage": 1}, data={"seq_length": LENGTH},
                         train={"micro_batch_size": BATCH, "global_batch_size": 2 * BATCHES * BATCH})  # fmt: skip
    sent = sum(plan_run(config, 2).sent_bytes.values()) / BATCHES
    assert (communication.bytes, communication.bound_by) == (sent, "link")
    assert communication.seconds == sent / (0.1 * 1e9)
    assert two.tokens == 2 * alone.tokens
    assert "communication" not in {part.name for part in alone.parts}
    assert two.seconds < alone.seconds + communication.seconds  # each steps half of the weights


def test_unfused_attention_is_bound_by_the_memory_of_its_scores() -> None:
    (scores,) = (part for part in estimate_of(attention="unfused").parts if part.name == "scores, softmax")
    assert scores.bound_by == "memory"
    model = make_config().model
    elements = BATCH * model.num_attention_heads * LENGTH**2
    # Forward: the bias is added 2 + 4, the softmax 4 + 4, the cast 4 + 2; backward: the cast 2 + 4, the softmax
    # 4 + 4 + 4, the sum's cast 4 + 2. Beside that the bias itself, of one sequence, and q, k and v.
    per_element = (2 + 4) + (4 + 4) + (4 + 2) + (2 + 4) + (4 + 4 + 4) + (4 + 2)
    assert scores.bytes > model.num_layers * elements * per_element
    assert scores.bytes < 2 * model.num_layers * elements * per_element


@pytest.mark.parametrize(
    ("stage", "precision", "accumulated", "stepped"),
    [
        (0, "bf16", 12, 28 + 12),  # fp32 weights: a gradient and the sum read, the sum written
        (1, "bf16", 10, (28 + 12 + 6) / 2),  # half of the weights are this rank's
        (2, "bf16", 4 + 10 / 2, (28 + 12 + 6) / 2),  # through a bucket
        (3, "fp32", 8 + 12 / 2, (28 + 12) / 2),
    ],
)
def test_what_comes_after_the_gradient_by_hand(stage: int, precision: str, accumulated: float, stepped: float) -> None:
    config = make_config(zero={"stage": stage}, train={"precision": precision, "global_batch_size": 8})
    work = count_after_gradients(config, derive(config, 2), 1000)
    assert work["gradient accumulation"].bytes == 1000 * accumulated
    assert work["optimizer"].bytes == 1000 * stepped / 4  # four micro batches in a step
    nesterov = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, kind="nesterov"))
    of_nesterov = count_after_gradients(nesterov, derive(nesterov, 2), 1000)["optimizer"].bytes
    assert of_nesterov == work["optimizer"].bytes - 8 * 1000 / (2 if stage else 1) / 4


def test_json_says_that_it_is_an_estimate_and_has_the_totals() -> None:
    roofline = estimate_of()
    record = json.loads(json.dumps(roofline.to_json()))
    assert record["what"] == "an estimate, not measured"
    assert (record["seconds"], record["tokens_per_second"]) == (roofline.seconds, roofline.tokens_per_second)
    assert record["mfu_causal"] == roofline.mfu(causal=True)
    assert record["mfu_full"] == roofline.mfu(causal=False)
    assert record["rates"] == dataclasses.asdict(RATES)
    assert {part["name"] for part in record["parts"]} >= set(PRODUCTS) - {"products of scores"}


def test_rates_that_are_given_win_over_the_defaults() -> None:
    assert parse_rates("") == Rates()
    assert parse_rates("matmul=0.7, link=1") == dataclasses.replace(Rates(), matmul=0.7, link=1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed=1", "--rates=speed=1: must name one of matmul, attention, memory, link"),
        ("matmul", "--rates=matmul: must be a name and a number, as in matmul=0.8"),
        ("matmul=fast", "--rates=matmul=fast: must be a name and a number"),
        ("matmul=0", "--rates=matmul=0: must be a share above 0 and up to 1"),
        ("memory=1.1", "--rates=memory=1.1: must be a share above 0 and up to 1"),
        ("memory=nan", "--rates=memory=nan: must be a share above 0"),
    ],
)
def test_rates_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_rates(text)
    assert str(refusal.value).startswith(message)


def test_fp32_and_a_gpu_of_unknown_speed_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.precision=fp32: must be bf16 or fp16 with --roofline"):
        estimate_of(train={"precision": "fp32", "global_batch_size": 1})
    config = make_config()
    slow = dataclasses.replace(GPU, peak_flops_per_second=0.0)
    with pytest.raises(ConfigError, match=r"--roofline: must come with --gpu NAME, because no speed is known"):
        estimate(config, plan_run(config, 1), slow, RATES)
