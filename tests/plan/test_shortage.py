from __future__ import annotations

import dataclasses
import re
import socket

from megalibi.config import Config, derive
from megalibi.plan.run_plan import plan_memory
from megalibi.plan.shortage import explain_shortage
from megalibi.runtime.shortage import ADVICE, Shortage
from megalibi.units import format_bytes
from tests.support.runs import make_config

GPU = Shortage(kind="GPU", asked_bytes=20 * 10**9, said="CUDA out of memory")
HOST = Shortage(kind="host", asked_bytes=None, said="std::bad_alloc")


def configure(**sections: dict[str, object]) -> Config:
    return make_config("tokens", **{"train": {"micro_batch_size": 4, "precision": "bf16"}, **sections})


def test_the_plan_of_the_run_is_named_and_what_lowers_it_with_the_plan_of_that() -> None:
    config = configure()
    line = explain_shortage(GPU, config, 2, "cuda")
    planned = plan_memory(config, derive(config, 2))
    start = (
        f"not enough memory on {socket.gethostname()}, the GPU's: 20.0 GB more were asked for; a rank of this run is "
    )
    assert line.startswith(f"{start}planned with {format_bytes(planned.total)} at the peak of a step (weights ")
    smaller = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=2))
    total = format_bytes(plan_memory(smaller, derive(smaller, 2)).total)
    assert f"train.micro_batch_size=2 ({total})" in line
    settings = re.findall(r"(\w+\.\w+=\w+) \(", line)
    assert 0 < len(settings) <= 3
    assert "\n" not in line


def test_where_nothing_is_left_to_lower_the_model_is_named() -> None:
    config = configure(
        train={"micro_batch_size": 1, "precision": "bf16"}, model={"recompute": "full"}, zero={"stage": 0}
    )
    line = explain_shortage(GPU, config, 1, "cuda")
    assert line.endswith("less is planned with a smaller model or data.seq_length, or on more ranks")


def test_the_memory_of_a_gpus_host_is_that_of_the_copies() -> None:
    line = explain_shortage(HOST, configure(checkpoint={"every_steps": 2}), 2, "cuda")
    assert ", the host's: std::bad_alloc; each rank of this run is planned with " in line
    assert line.endswith("there, a copy to write checkpoints from: checkpoint.asynchronous=false needs none")
    line = explain_shortage(HOST, configure(checkpoint={"asynchronous": False}), 2, "cuda")
    assert "start fewer ranks on the host" in line


def test_what_cannot_be_planned_gets_advice_without_figures() -> None:
    line = explain_shortage(HOST, configure(), 3, "cpu")
    assert line == f"not enough memory on {socket.gethostname()}, the host's: std::bad_alloc; {ADVICE}"
