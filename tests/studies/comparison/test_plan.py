from __future__ import annotations

import math
from pathlib import Path

import pytest

from megalibi.config import derive, padded_vocab_size
from megalibi.errors import ConfigError
from megalibi.model import count_parameters
from megalibi.plan.gpus import GIB, USABLE, get_gpu
from megalibi.plan.memory_trace import MemoryByKind
from megalibi.studies.comparison.plan import check_fits, describe_memory, find_shapes, plan_variants, select_plans
from megalibi.studies.comparison.study import ATTENTIONS, ComparedModel, CompareStudy, Variant
from megalibi.studies.study import load_study

PLAN_BOUND = 1.08
"""What CUDA's allocator may hold, by the plan: CUDA_BOUND of test_plan_memory.py."""
LARGE = Path(__file__).parents[3] / "configs" / "compare_1.3b.yaml"
SMALL_MEMORY = MemoryByKind(
    weights=3 * GIB, gradients=2 * GIB, optimizer_states=6 * GIB, activations=GIB, attention_workspace=0, other=0
)
LARGE_MEMORY = MemoryByKind(
    weights=3 * GIB, gradients=2 * GIB, optimizer_states=6 * GIB, activations=GIB, attention_workspace=8 * GIB, other=0
)
PLANS = {
    Variant(model=ComparedModel(method="alibi", length=1024), attention="fast"): SMALL_MEMORY,
    Variant(model=ComparedModel(method="sinusoidal", length=2048), attention="unfused"): LARGE_MEMORY,
}


def test_shapes_of_the_large_scale_are_the_papers_and_make_1300_million_parameters() -> None:
    study, base = load_study(LARGE, [], CompareStudy)
    shapes = find_shapes(base)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    padded = derive(base, study.ranks).padded_vocab_size
    assert padded == padded_vocab_size(50257, 1)
    assert parameters == count_parameters(base.model, padded)
    assert parameters == pytest.approx(1.3e9, rel=0.05)
    assert shapes["embedding.weight"] == (padded, 2048)
    assert len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}) == 25


def test_micro_batches_of_the_large_scale_are_the_largest_powers_of_two_that_fit_80_gb(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usable_bytes = get_gpu("H100").usable_bytes

    def largest(factor: int, *chosen: ComparedModel) -> dict[str, int]:
        """Planned bytes of the largest model of each kind of attention, of those chosen or of all."""
        study, base = load_study(LARGE, [], CompareStudy)
        sizes = [f"train.micro_batch_size={factor * base.train.micro_batch_size}",
                 f"study.unfused_micro_batch_size={factor * study.unfused_micro_batch_size}"]  # fmt: skip
        study, base = load_study(LARGE, ["study.lengths=[1024,2048]", *sizes], CompareStudy)
        if chosen:
            monkeypatch.setattr(CompareStudy, "models", lambda _: list(chosen))
        plans = plan_variants(base, study, device_type="cuda")
        return {kind: max(p.total for v, p in plans.items() if v.attention == kind) for kind in ATTENTIONS}

    # Also where CUDA's allocator holds as much more than the plan as its test allows. One model that does not fit at
    # twice the size is enough: the largest does not either.
    assert PLAN_BOUND * max(largest(1).values()) <= usable_bytes
    assert usable_bytes < PLAN_BOUND * min(largest(2, ComparedModel(method="sinusoidal", length=2048)).values())


def test_half_the_length_saves_planned_memory_only_where_scores_are_held() -> None:
    study, base = load_study(LARGE, ["study.lengths=[1024,2048]", "model.num_layers=3"], CompareStudy)
    plans = plan_variants(base, study, device_type="cuda")
    assert len(plans) == 8
    (pair,) = study.pairs()
    for attention in ATTENTIONS:
        short, long = (plans[Variant(model=model, attention=attention)] for model in pair)
        equal = plans[Variant(model=ComparedModel(method="alibi", length=2048), attention=attention)]
        assert short.weights == long.weights == 2 * count_parameters(base.model, 50304)
        assert short.optimizer_states == long.optimizer_states == 6 * short.weights
        assert equal.total == pytest.approx(long.total, rel=0.007)  # the paper's ALiBi: 0 to 0.7% more
        if attention == "unfused":
            assert short.attention_workspace < 0.6 * long.attention_workspace
            assert short.total < long.total
        else:
            assert short.total == pytest.approx(long.total, rel=0.001)


def test_a_gpu_that_is_too_small_is_refused_with_what_is_needed() -> None:
    with pytest.raises(ConfigError) as refusal:
        check_fits(PLANS, "V100-16GB", get_gpu("V100-16GB").memory_bytes)
    message = str(refusal.value)
    assert message.startswith(
        "sinusoidal_2048_unfused needs 20.0 GiB (attention workspace 8.0, optimizer states 6.0, weights 3.0, gradients "
        "2.0, activations 1.0) on each GPU, and 95% of V100-16GB's 16.0 are there for it: "
    )
    for remedy in ("model.recompute=full", "train.micro_batch_size", "study.ranks"):
        assert remedy in message


def test_a_gpu_that_is_large_enough_is_taken() -> None:
    check_fits(PLANS, "a GPU", math.ceil(20 * GIB / USABLE))
    with pytest.raises(ConfigError, match=r"needs 20\.0 GiB"):
        check_fits(PLANS, "a GPU", 20 * GIB)  # CUDA itself takes some


def test_a_gpu_needs_room_only_for_the_part_that_runs() -> None:
    _, base = load_study(LARGE, [], CompareStudy)
    fast, unfused = PLANS
    assert select_plans(PLANS, base, "quality") == {fast: PLANS[fast]}
    check_fits(select_plans(PLANS, base, "quality"), "V100-16GB", get_gpu("V100-16GB").memory_bytes)
    for part in ("speed", "all"):
        assert select_plans(PLANS, base, part) == PLANS
    _, base = load_study(LARGE, ["model.attention_backend=unfused"], CompareStudy)
    assert select_plans(PLANS, base, "quality") == {unfused: PLANS[unfused]}


def test_small_parts_are_not_worth_a_word() -> None:
    assert describe_memory(SMALL_MEMORY) == "optimizer states 6.0, weights 3.0, gradients 2.0, activations 1.0"
