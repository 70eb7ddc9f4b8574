from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from megalibi.config import OptimizerConfig
from megalibi.engine.ds_config import INITIAL_LOSS_SCALE_POWER, LOSS_SCALE_WINDOW
from megalibi.engine.optimizer import ClippedAdamW, ClippedNesterov, Nesterov, build_optimizer
from megalibi.model.init import Constant, set_init
from megalibi.parallel import ALONE, Group, ShardSpec, set_shard_spec
from tests.support.ranks import run_on_ranks
from tests.support.runs import PlainNag
from tests.support.tensors import randn, tensor_group

CONFIG = OptimizerConfig(learning_rate=1e-2, weight_decay=0.3, clip_grad_norm=0.7)
INITIAL_SCALE = 2.0**INITIAL_LOSS_SCALE_POWER


def make_parameters() -> list[nn.Parameter]:
    return [nn.Parameter(randn(0, 5, 3)), nn.Parameter(randn(1, 7)), nn.Parameter(randn(2, 2, 4))]


def make_optimizer(parameters: list[nn.Parameter], *, fp16: bool = False, group: Group = ALONE) -> ClippedAdamW:
    optimizer = build_optimizer(parameters, CONFIG, zero_stage=0, tensor=group, fp16=fp16)
    assert isinstance(optimizer, ClippedAdamW)
    return optimizer


def set_grads(parameters: list[nn.Parameter], step: int, factor: float = 1.0) -> None:
    for number, parameter in enumerate(parameters):
        parameter.grad = randn(100 * step + number, *parameter.shape) * factor / (step + 1) ** 2


def step_plain(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> float:
    norm = nn.utils.clip_grad_norm_(parameters, CONFIG.clip_grad_norm)
    optimizer.step()
    return norm.item()


def make_plain(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    groups = [
        {"params": [parameters[0], parameters[2]], "weight_decay": CONFIG.weight_decay},
        {"params": [parameters[1]], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=CONFIG.learning_rate, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.epsilon, foreach=False
    )


@pytest.mark.parametrize("fp16", [False, True])
def test_steps_equal_torch_with_clip_grad_norm(fp16: bool) -> None:
    ours, plain = make_parameters(), make_parameters()
    optimizer, optimizer_ref = make_optimizer(ours, fp16=fp16), make_plain(plain)
    norms = []
    for step in range(6):
        set_grads(ours, step, factor=optimizer.loss_scale)
        set_grads(plain, step)
        optimizer.step()
        norms.append(step_plain(optimizer_ref, plain))
        assert optimizer._global_grad_norm == pytest.approx(norms[-1], rel=1e-6)
        for parameter, parameter_ref in zip(ours, plain, strict=True):
            torch.testing.assert_close(parameter, parameter_ref, rtol=1e-6, atol=1e-7)
    assert max(norms) > CONFIG.clip_grad_norm > min(norms)  # clipped and not


def test_matrices_decay_vectors_and_tables_of_positions_do_not() -> None:
    parameters = [*make_parameters(), nn.Parameter(torch.ones(3, 3))]
    set_init(parameters[-1], Constant(1.0), may_decay=False)
    for zero_stage in (0, 1):
        optimizer = build_optimizer(parameters, CONFIG, zero_stage=zero_stage, tensor=ALONE, fp16=False)
        decaying, spared = optimizer.param_groups
        assert [p.shape for p in decaying["params"]] == [(5, 3), (2, 4)]
        assert [p.shape for p in spared["params"]] == [(7,), (3, 3)]
        assert (decaying["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
        assert optimizer.defaults["fused"]
        assert isinstance(optimizer, ClippedAdamW) == (zero_stage == 0)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_nesterov_is_fairseqs_nag_while_the_learning_rate_moves(zero_stage: int) -> None:
    config = dataclasses.replace(CONFIG, kind="nesterov", momentum=0.9)
    ours, plain = make_parameters(), make_parameters()
    optimizer = build_optimizer(ours, config, zero_stage=zero_stage, tensor=ALONE, fp16=False)
    assert isinstance(optimizer, ClippedNesterov if zero_stage == 0 else Nesterov)
    groups = [
        {"params": [plain[0], plain[2]], "weight_decay": CONFIG.weight_decay},
        {"params": [plain[1]], "weight_decay": 0.0},
    ]
    optimizer_ref = PlainNag(groups, {"momentum": 0.9})
    for step, learning_rate in enumerate((1e-7, 0.5, 1.0, 0.9, 0.3, 1e-4, 1e-4)):
        for group in (*optimizer.param_groups, *optimizer_ref.param_groups):
            group["lr"] = learning_rate
        set_grads(ours, step)
        set_grads(plain, step)
        if zero_stage == 1:
            nn.utils.clip_grad_norm_(ours, CONFIG.clip_grad_norm)  # DeepSpeed's work there
        optimizer.step()
        step_plain(optimizer_ref, plain)
        for parameter, parameter_ref in zip(ours, plain, strict=True):
            torch.testing.assert_close(parameter, parameter_ref, rtol=1e-5, atol=1e-6)


def overflow(parameters: list[nn.Parameter], value: float) -> None:
    set_grads(parameters, 0)
    grad = parameters[1].grad
    assert grad is not None
    grad[3] = value


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_overflow_skips_the_step_and_halves_the_scale(value: float) -> None:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, fp16=True)
    before = [p.detach().clone() for p in parameters]
    overflow(parameters, value)
    optimizer.step()
    assert optimizer.overflow
    assert optimizer.loss_scale == INITIAL_SCALE / 2
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert not optimizer.state
    set_grads(parameters, 0, factor=optimizer.loss_scale)
    optimizer.step()
    assert not optimizer.overflow
    assert optimizer.loss_scale == INITIAL_SCALE / 2
    assert not torch.equal(parameters[0], before[0])


def test_scale_doubles_after_a_window_of_good_steps_and_never_falls_below_one() -> None:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, fp16=True)
    for _ in range(LOSS_SCALE_WINDOW + 1):
        assert optimizer.loss_scale == INITIAL_SCALE
        set_grads(parameters, 0)
        optimizer.step()
    assert optimizer.loss_scale == 2 * INITIAL_SCALE
    for _ in range(INITIAL_LOSS_SCALE_POWER + 3):
        overflow(parameters, math.inf)
        optimizer.step()
    assert optimizer.loss_scale == 1.0


def _norm_and_scale(bad_rank: int | None) -> tuple[float, float, bool, Tensor]:
    """A sharded and a replicated parameter; optionally a gradient that overflows on one rank."""
    group = tensor_group()
    sharded, replicated = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(5))
    set_shard_spec(sharded, ShardSpec(dim=0, full_size=2 * group.size))
    optimizer = make_optimizer([sharded, replicated], fp16=True, group=group)
    full = randn(1, 2 * group.size, 3) * optimizer.loss_scale
    sharded.grad = full.chunk(group.size)[group.rank].clone()
    if group.rank == bad_rank:
        sharded.grad[0, 0] = math.inf
    replicated.grad = randn(2, 5) * optimizer.loss_scale
    optimizer.step()
    return optimizer._global_grad_norm, optimizer.loss_scale, optimizer.overflow, replicated.detach()


def test_trap_1_norm_counts_each_shard_and_each_whole_tensor_once() -> None:
    expected = torch.cat([randn(1, 8, 3).flatten(), randn(2, 5)]).norm().item()
    for norm, scale, overflowed, replicated in run_on_ranks(4, _norm_and_scale, None):
        assert norm == pytest.approx(expected, rel=1e-6)
        assert (scale, overflowed) == (INITIAL_SCALE, False)
        assert replicated.count_nonzero() == 5


LONG_GRADIENT = 4_000_000
FP64_SUM_RELATIVE_BOUND = LONG_GRADIENT * 2.0**-53 / 2
"""2e-10: of a norm whose squares are summed in fp64, one rounding for each, in any order; 1e-13 was seen."""


def test_trap_17_the_norm_of_a_long_gradient_is_summed_in_fp64() -> None:
    parameters = [nn.Parameter(torch.zeros(1000, LONG_GRADIENT // 2000)), nn.Parameter(torch.zeros(LONG_GRADIENT // 2))]
    optimizer = make_optimizer(parameters)
    for number, parameter in enumerate(parameters):
        parameter.grad = randn(number, *parameter.shape)
    flat = torch.cat([randn(number, *parameter.shape).flatten() for number, parameter in enumerate(parameters)])
    exact = math.sqrt(math.fsum(flat.double().square().tolist()))  # squares of fp32 are exact in fp64
    optimizer.step()
    assert optimizer._global_grad_norm == pytest.approx(exact, rel=FP64_SUM_RELATIVE_BOUND, abs=0.0)


def test_a_norm_whose_square_is_beyond_fp32_is_a_number() -> None:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, fp16=True)
    optimizer.loss_scale = 2.0**100
    set_grads(parameters, 0, factor=2.0**100)
    exact = torch.cat([randn(number, *p.shape).flatten() for number, p in enumerate(parameters)]).double().norm()
    optimizer.step()
    assert not optimizer.overflow
    assert optimizer._global_grad_norm == pytest.approx(exact.item(), rel=FP64_SUM_RELATIVE_BOUND, abs=0.0)


def test_overflow_on_one_tensor_rank_skips_the_step_on_all() -> None:
    for _, scale, overflowed, replicated in run_on_ranks(4, _norm_and_scale, 2):
        assert (scale, overflowed) == (INITIAL_SCALE / 2, True)
        assert replicated.count_nonzero() == 0
