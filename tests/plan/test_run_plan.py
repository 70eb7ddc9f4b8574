from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megalibi.config import Config, derive, load_config
from megalibi.errors import ConfigError
from megalibi.model import GPT, count_parameters, model_flops_per_token
from megalibi.parallel import WHOLE
from megalibi.plan.gpus import Gpu, get_gpu
from megalibi.plan.run_plan import find_largest_micro_batch, plan_memory, plan_run, plan_snapshot_bytes
from tests.support.steps import make_config

CONFIGS = Path(__file__).parents[2] / "configs"
PAPERS_MODELS = sorted(CONFIGS.glob("gpt_1.3b_*.yaml"))


def make_gpu(memory_bytes: int) -> Gpu:
    return Gpu(name="test", memory_bytes=memory_bytes, peak_flops_per_second=1e12, memory_bytes_per_second=1e11,
               link_bytes_per_second=1e10, source="nowhere")  # fmt: skip


@pytest.mark.parametrize("path", PAPERS_MODELS, ids=lambda path: path.stem)
def test_the_papers_model_has_1_3_billion_parameters_on_the_meta_device_too(path: Path) -> None:
    config = load_config(path)
    with torch.device("meta"):
        model = GPT(config.model, padded_vocab_size=config.model.vocab_size, layout=WHOLE)
    plan = plan_run(config, 8)
    assert plan.parameters == sum(p.numel() for p in model.parameters()) == pytest.approx(1.3e9, rel=0.05)
    # Rank for rank: a share of the matrices, all the norms.
    assert plan.parameters_per_rank == pytest.approx(plan.parameters / config.parallel.tensor_parallel_size, rel=1e-3)


@pytest.mark.parametrize("path", PAPERS_MODELS, ids=lambda path: path.stem)
def test_the_memory_of_a_papers_model_is_what_its_head_says(path: Path) -> None:
    stated = re.search(r"([\d.]+) GB at the peak of a step, ([\d.]+) GB of it .*--ranks (\d+)", path.read_text())
    assert stated, f"{path}: the head does not say '... GB at the peak of a step, ... GB of it ... --ranks N'"
    config = load_config(path)
    memory = plan_memory(config, derive(config, int(stated[3])))
    states = memory.weights + memory.gradients + memory.optimizer_states
    assert (stated[1], stated[2]) == (f"{memory.total / 1e9:.1f}", f"{states / 1e9:.1f}")


def test_a_plan_adds_up() -> None:
    config = make_config(
        model={"recompute": "full"},
        parallel={"tensor_parallel_size": 2},
        zero={"stage": 2},
        train={"global_batch_size": 24, "micro_batch_size": 2},
        checkpoint={"every_steps": 1},
    )
    plan = plan_run(config, 4, get_gpu("a100-40gb"))
    assert (plan.ranks, plan.data_parallel_size, plan.accumulation_steps) == (4, 2, 6)
    assert plan.parameters == count_parameters(config.model)
    assert plan.batch_tokens == 24 * 256
    per_token = [model_flops_per_token(config.model, 256, causal=causal) for causal in (False, True)]
    assert [plan.flops.full, plan.flops.causal] == [plan.batch_tokens * flops for flops in per_token]
    assert plan.flops.full < plan.flops.recomputed < 4 / 3 * plan.flops.full
    assert plan.fits
    assert plan.largest_micro_batch == 12
    assert plan.seconds_at_peak == plan.flops.recomputed / 4 / 312e12
    assert plan.memory == plan_memory(config, derive(config, 4))
    assert plan.snapshot_bytes == 12 * math.ceil(plan.parameters_per_rank / 2)
    momentum = make_config(optimizer={"kind": "nesterov"}, checkpoint={"asynchronous": False})
    assert plan_snapshot_bytes(momentum, derive(momentum, 1), 100) == 0
    momentum = make_config(optimizer={"kind": "nesterov"}, checkpoint={"asynchronous": True, "every_steps": 2})
    assert plan_snapshot_bytes(momentum, derive(momentum, 1), 100) == 800
    one_save = make_config(checkpoint={"asynchronous": True, "every_steps": 3})  # after the last of 3 steps
    assert plan_snapshot_bytes(one_save, derive(one_save, 1), 100) == 0


def test_communication_grows_with_the_micro_batches_where_they_communicate() -> None:
    def sent(stage: int, batches: int) -> dict[str, int]:
        train = {"global_batch_size": 2 * batches, "micro_batch_size": 1}
        config = make_config(zero={"stage": stage}, train=train)
        return plan_run(config, 2).sent_bytes

    parameters = count_parameters(make_config().model)
    # Stages 0 and 1 reduce once, in fp32; 1 gathers 16-bit weights once. One of two ranks sends half, or twice that.
    assert sent(0, 3) == sent(0, 1) == {"data all-reduce": pytest.approx(4 * parameters, rel=1e-3)}
    assert sent(1, 3) == sent(1, 1)
    assert sent(1, 1)["data all-gather"] == pytest.approx(parameters, rel=1e-3)
    # Stage 2 reduces every micro batch, and 3 gathers for each too.
    assert sent(2, 3)["data all-reduce"] == 3 * sent(2, 1)["data all-reduce"]
    assert sent(3, 3)["data reduce-scatter"] == 3 * sent(3, 1)["data reduce-scatter"]
    assert sent(3, 3)["data all-gather"] > 2.5 * sent(3, 1)["data all-gather"]


def test_sequence_parallelism_sends_as_much_as_tensor_parallelism_but_for_what_it_gathers_again() -> None:
    def sent(sequence_parallel: bool) -> int:
        parallel = {"tensor_parallel_size": 2, "sequence_parallel": sequence_parallel}
        return sum(plan_run(make_config(parallel=parallel), 2).sent_bytes.values())

    assert sent(False) < sent(True) < 1.5 * sent(False)


def test_largest_micro_batch_is_the_last_divisor_that_fits() -> None:
    config = make_config(train={"global_batch_size": 12})
    sizes = (1, 2, 3, 4, 6, 12)
    totals = {
        size: plan_memory(sized, derive(sized, 1)).total for size in sizes for sized in [with_micro(config, size)]
    }
    for size, next_size in zip(sizes, (*sizes[1:], None), strict=True):
        just_enough = make_gpu(int(totals[size] / 0.95) + 2)
        assert find_largest_micro_batch(config, 1, just_enough) == size
        assert next_size is None or totals[next_size] > totals[size]
    too_small = make_gpu(totals[1] // 2)
    assert find_largest_micro_batch(config, 1, too_small) == 0
    assert not plan_run(config, 1, too_small).fits


def with_micro(config: Config, size: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=size))


def test_without_a_gpu_nothing_is_said_of_one() -> None:
    plan = plan_run(make_config(), 1)
    assert (plan.gpu, plan.fits, plan.largest_micro_batch, plan.seconds_at_peak) == (None, None, None, None)


@pytest.mark.parametrize(
    ("fields", "ranks", "message"),
    [({}, 3, r"train\.global_batch_size=2: must be a multiple"), ({"tensor_parallel_size": 3}, 3, r"must divide")],
)
def test_ranks_that_do_not_fit_are_refused(fields: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_run(make_config(parallel=fields), ranks)
