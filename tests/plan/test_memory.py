"""The plan of a step against real steps of the real engine: every ZeRO stage, precision, layout and position method."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megalibi.config import Config, derive
from megalibi.errors import ConfigError
from megalibi.plan.communication import sum_sent_bytes
from megalibi.plan.memory import TracedStep, trace_step
from megalibi.plan.memory_trace import MemoryByKind
from megalibi.plan.run_plan import plan_memory
from tests.support.device import DEVICE, ON_GPU
from tests.support.ranks import run_on_ranks
from tests.support.steps import make_config, measure_steps

BOUND = 0.01
"""Relative, in total (0.0005 was seen) and of every kind that is large (0.0065)."""
SENT_BOUND = 0.01
"""Relative, of every kind of communication that is large; what tells ranks of norms and token counts is small. 4e-6 was
seen."""
LARGE = 0.05
"""Of the total."""


def case(stage: int, tensor: int = 1, data: int = 1, *, precision: str = "bf16", micro: int = 1, batches: int = 2,
         **model: Any) -> Config:  # fmt: skip
    """A step of some micro batches of some size; sections other than the model's go by their names."""
    zero, parallel = model.pop("zero", {}), model.pop("parallel", {})
    train = {"precision": precision, "micro_batch_size": micro, "global_batch_size": micro * batches * data}
    return make_config(
        model=model,
        train=train,
        zero={"stage": stage} | zero,
        parallel={"tensor_parallel_size": tensor} | parallel,
    )


SMALL_BUCKETS = {"bucket_elements": 300_000}
ON_ONE_RANK = {
    "stage 0": case(0),
    "stage 1": case(1, micro=2),
    "stage 2 fp32": case(2, precision="fp32"),
    "stage 3": case(3, micro=2),
    "one micro batch, recomputed": case(2, micro=4, batches=1, recompute="full"),
    "unfused": case(1, micro=2, attention_backend="unfused"),
    "unfused, recomputed": case(2, micro=4, batches=1, attention_backend="unfused", recompute="full"),
    "rotary, embedding norm": case(2, micro=2, position_method="rotary", embedding_norm=True),
    "t5_bias": case(2, micro=2, position_method="t5_bias"),
    "dropout": case(2, micro=4, batches=1, dropout=0.1, attention_dropout=0.0, activation_dropout=0.1),
    "sinusoidal, biases, untied": case(
        0, micro=2, precision="fp32", recompute="full", position_method="sinusoidal", bias=True, tie_embeddings=False,
        activation="relu",
    ),
    "adaptive": case(2, micro=4, batches=1, adaptive_cutoffs=[400, 1200], adaptive_factor=2),
}  # fmt: skip
ON_TWO_RANKS = {
    "stage 0": case(0, data=2),
    "stage 1": case(1, data=2, micro=2),
    "stage 1 fp32, small buckets": case(1, data=2, precision="fp32", zero=SMALL_BUCKETS),
    "stage 2, small buckets": case(2, data=2, batches=3, zero=SMALL_BUCKETS),
    "stage 2 fp32": case(2, data=2, micro=2, precision="fp32"),
    "stage 3": case(3, data=2, zero=SMALL_BUCKETS),
    "stage 3, recomputed": case(3, data=2, micro=2, recompute="full"),
    "tensor 2": case(1, 2, micro=2, batches=3),
    "tensor 2, stage 2": case(2, 2, micro=4),
    "tensor 2, sequence parallel": case(
        1,
        2,
        micro=4,
        parallel={"sequence_parallel": True},
        embedding_norm=True,
        norm_bias=True,
        scale_alibi=True,
        activation="gelu_tanh",
    ),
}
ON_FOUR_RANKS = {
    "tensor 2, data 2, stage 2": case(2, 2, 2),
    "tensor 2, data 2, stage 3 fp32": case(3, 2, 2, precision="fp32"),
}
SHORT = make_config(  # fp16 is slow on a CPU: little text, and the states are what is looked at
    data={"seq_length": 16}, zero={"stage": 1}, train={"precision": "fp16", "global_batch_size": 4},
    optimizer={"kind": "nesterov"},
)  # fmt: skip


def plan(config: Config, ranks: int) -> tuple[MemoryByKind, dict[str, int], int]:
    derived = derive(config, ranks)
    kind = "unfused" if config.model.attention_backend == "unfused" else "fused"
    step: TracedStep = trace_step(config, derived, attention=kind, device_type="cpu")
    sent = sum_sent_bytes(step.collectives["last"])
    for name, sent_bytes in sum_sent_bytes(step.collectives.get("micro", [])).items():
        sent[name] = sent.get(name, 0) + (derived.accumulation_steps - 1) * sent_bytes
    return step.memory, sent, step.parameters


def differences(planned: dict[str, float], measured: dict[str, float], bound: float) -> dict[str, tuple[float, float]]:
    """Figures, of those that are large in either, that differ by more than the bound."""
    least = LARGE * max(sum(measured.values()), 1)
    return {
        name: (planned.get(name, 0), measured.get(name, 0))
        for name in planned | measured
        if max(planned.get(name, 0), measured.get(name, 0)) > least
        and abs(planned.get(name, 0) - measured.get(name, 0)) > bound * measured.get(name, 0)
    }


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [(1, ON_ONE_RANK), (2, ON_TWO_RANKS), (4, ON_FOUR_RANKS), (2, {"stage 1 fp16, nesterov": SHORT})],
    ids=["1", "2", "4", "fp16"],
)
def test_plan_is_what_a_real_step_holds_and_sends(ranks: int, cases: dict[str, Config]) -> None:
    wrong = {}
    for name, measured in zip(cases, run_on_ranks(ranks, measure_steps, list(cases.values()))[0], strict=True):
        memory, sent, parameters = plan(cases[name], ranks)
        memory_ref, sent_ref, parameters_ref = measured
        off = differences(vars(memory), vars(memory_ref), BOUND)
        off |= differences(sent, sent_ref, SENT_BOUND)
        if memory.total != pytest.approx(memory_ref.total, rel=BOUND):
            off["total"] = (memory.total, memory_ref.total)
        if parameters != parameters_ref:
            off["parameters"] = (parameters, parameters_ref)
        if off:
            wrong[name] = off
    assert not wrong


def test_memory_of_fused_attention_is_linear_in_the_length_and_of_unfused_quadratic() -> None:
    def workspace(attention: str, length: int) -> int:
        config = make_config(data={"seq_length": length})
        return plan_memory(config, derive(config, 1), attention=attention).attention_workspace

    assert workspace("fused", 2048) == 2 * workspace("fused", 1024)
    assert 3.8 < workspace("unfused", 2048) / workspace("unfused", 1024) < 4.0  # the mask is of one layer


def test_two_buckets_where_reductions_run_beside_the_backward_pass() -> None:
    config = make_config(zero={"stage": 2, "bucket_elements": 10_000_000})
    derived = derive(config, 1)
    on_cuda, on_cpu = (plan_memory(config, derived, device_type=kind).other for kind in ("cuda", "cpu"))
    assert on_cuda - on_cpu == 2 * 10_000_000  # bf16


def test_zero_3_keeps_the_weights_of_a_small_model_whole_and_not_of_a_large_one() -> None:
    def whole(num_layers: int, hidden_size: int) -> float:
        model = {"num_layers": num_layers, "hidden_size": hidden_size, "num_attention_heads": 8,
                 "ffn_hidden_size": 4 * hidden_size, "recompute": "full"}  # fmt: skip
        config = make_config(model=model, zero={"stage": 3}, train={"global_batch_size": 8})
        step = trace_step(config, derive(config, 8))
        return step.memory.weights / (2 * step.parameters)

    assert whole(4, 512) > 1.0  # and this rank's part
    assert whole(24, 4096) < 0.4  # 4.8 B parameters: DeepSpeed lets 1 B live


def test_on_cuda_cross_entropy_makes_nothing_of_the_size_of_the_logits() -> None:
    config = make_config(
        model={"vocab_size": 32_768}, zero={"stage": 0}, train={"micro_batch_size": 4, "global_batch_size": 4}
    )
    on_cpu, on_cuda = (plan_memory(config, derive(config, 1), device_type=kind).total for kind in ("cpu", "cuda"))
    # The gradient in fp32 and its rounding to bf16, less what is the larger peak of the two then.
    assert 4.0 < (on_cpu - on_cuda) / (4 * 256 * 32_768) <= 6.0


CUDA_BOUND = 0.08
"""Relative: the allocator rounds up, and kernels hold memory inside themselves."""
LARGE_STEP: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 8, "hidden_size": 1024, "ffn_hidden_size": 4096, "vocab_size": 32_768},
    "data": {"seq_length": 1024},
    "zero": {"bucket_elements": 50_000_000},
    "train": {"micro_batch_size": 4, "global_batch_size": 8},
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("stage", "backend", "recompute"), [(1, "auto", "none"), (2, "auto", "full"), (0, "unfused", "none")]
)
def test_plan_is_what_a_process_of_its_own_holds(stage: int, backend: str, recompute: str) -> None:
    """On CUDA by its allocator, which counts what the trace does not see."""
    sections = copy.deepcopy(LARGE_STEP) if ON_GPU else {"model": {}, "zero": {}}
    sections["model"] |= {"attention_backend": backend, "recompute": recompute}
    sections["zero"] |= {"stage": stage}
    config = make_config(**sections)
    # A process each: what a step before it still held would count.
    command = [sys.executable, "-m", "tests.support.step_memory"]
    process = subprocess.run(command, input=pickle.dumps(config), capture_output=True, cwd=Path(__file__).parents[2])
    assert process.returncode == 0, process.stderr.decode()
    measured: MemoryByKind = pickle.loads(bytes.fromhex(process.stdout.split()[-1].decode()))
    attention = "unfused" if backend == "unfused" else "fused"
    planned = plan_memory(config, derive(config, 1), attention=attention, device_type=DEVICE)
    beside = {kind: (size, vars(measured)[kind]) for kind, size in vars(planned).items()}
    bound = CUDA_BOUND if ON_GPU else BOUND
    assert planned.total == pytest.approx(measured.total, rel=bound), f"planned and measured bytes: {beside}"


def test_unknown_kind_of_attention_is_refused() -> None:
    config = make_config()
    with pytest.raises(ConfigError, match=r"^--attention=flash: must be one of fused, unfused$"):
        plan_memory(config, derive(config, 1), attention="flash")
