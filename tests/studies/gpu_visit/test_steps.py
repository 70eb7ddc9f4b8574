"""The plan of a visit to a GPU, without one: every command is one that its script takes."""

from __future__ import annotations

import sys
from pathlib import Path

from megalibi.config import load_config
from megalibi.studies.extrapolation.study import ExtrapolationStudy
from megalibi.studies.gpu_visit.setup import Setup
from megalibi.studies.gpu_visit.step import VisitStep, expect_seconds
from megalibi.studies.gpu_visit.steps import CONFIG_1_3B, plan_steps
from megalibi.studies.study import load_study

ROOT = Path(__file__).parents[3]
TRAININGS = ("train_alibi", "train_alibi_long", "train_no_positions", "train_sinusoidal", "profile_step")


def plan(tmp_path: Path, **more: object) -> dict[str, VisitStep]:
    setup = {"device": "cuda", "seconds": 540.0, "folder": tmp_path, "scratch": tmp_path, "root": ROOT,
             "python": sys.executable, "data": "tokens", **more}  # fmt: skip
    return {step.name: step for step in plan_steps(Setup(**setup))}


def overrides_of(step: VisitStep) -> list[str]:
    return [word for word in step.command if "=" in word and not word.startswith("--")]


def test_trainings_are_the_1_3b_model_on_one_card(tmp_path: Path) -> None:
    steps = plan(tmp_path, overrides=["train.micro_batch_size=1"])
    lengths = {}
    for name in TRAININGS:
        config = load_config(ROOT / CONFIG_1_3B, overrides_of(steps[name]))
        assert (config.model.num_layers, config.model.hidden_size, config.model.recompute) == (25, 2048, "none")
        assert config.parallel.tensor_parallel_size == 1
        assert config.train.micro_batch_size == 1  # the user's wins
        lengths[name] = (config.model.position_method, config.data.seq_length)
    assert lengths == {
        "train_alibi": ("alibi", 2048),
        "train_alibi_long": ("alibi", 8192),
        "train_no_positions": ("none", 2048),
        "train_sinusoidal": ("sinusoidal", 2048),
        "profile_step": ("alibi", 2048),
    }


def test_the_steps_of_nine_minutes_fit_them_or_have_a_reason(tmp_path: Path) -> None:
    steps = plan(tmp_path, peers=["flash_attn"])
    assert all(step.limit <= 540 for step in steps.values() if not step.impossible)
    assert steps["extrapolation"].impossible.startswith("it takes an hour")
    assert steps["attention_compiled"].impossible == "no peer here is compiled by torch"
    assert "flash_attn" in steps["attention_batch_8"].command
    assert steps["test_gpu"].environment == {"TEST_DEVICE": "cuda"}
    assert steps["test_gpu"].output == tmp_path / "test_gpu.xml"  # which is removed where the step is done again
    assert [name for name, step in steps.items() if step.in_background] == ["warm", "plan"]


def test_triton_compiles_beside_what_needs_it_not(tmp_path: Path) -> None:
    steps = list(plan(tmp_path, peers=["flash_attn"]).values())
    waiting = next(number for number, step in enumerate(steps) if step.after == "warm")
    assert [step.name for step in steps[:waiting]] == ["warm", "machine", "ceilings"]
    # The tests and resume may use what is compiled, and come after somebody has waited for it.
    assert all(step.name in ("test_gpu", "resume", "plan") or step.after for step in steps[waiting:] if step.expected
               and not step.impossible)  # fmt: skip


def test_nothing_is_timed_beside_the_plan(tmp_path: Path) -> None:
    names = list(plan(tmp_path))
    after = names[names.index("plan") + 1 :]
    assert after[:2] == ["resume", "test_gpu"]
    assert names.index("train_alibi_long") < names.index("plan")


def test_what_the_steps_of_nine_minutes_are_expected_to_take_fits_them(tmp_path: Path) -> None:
    steps = plan(tmp_path, peers=["flash_attn"])
    assert all(0 < step.expected <= step.limit for step in steps.values())
    assert steps["attention_compiled"].impossible  # with such peers it is for the next visit
    assert 0.8 * 540 < expect_seconds(list(steps.values())) <= 540


def test_the_tests_end_themselves_before_they_are_killed(tmp_path: Path) -> None:
    step = plan(tmp_path)["test_gpu"]
    (seconds,) = [float(word.partition("=")[2]) for word in step.command if word.startswith("--session-timeout=")]
    assert 0 < seconds < step.limit


def test_cuda_graphs_are_of_our_kernel_and_flash_attn(tmp_path: Path) -> None:
    step = plan(tmp_path, peers=["cudnn_folded", "flash_attn", "flash_attn_alibi"])["attention_cuda_graph"]
    words = list(step.command)
    values = [words[words.index(option) + 1] for option in ("--batch", "--lengths", "--backends", "--peers")]
    assert values == ["1", "1024,2048", "triton", "flash_attn,flash_attn_alibi"]
    assert "--cuda-graph" in words
    assert plan(tmp_path, device="cpu")["attention_cuda_graph"].impossible == "CUDA graphs need a GPU"


def test_an_hour_and_text_allow_the_extrapolation_study(tmp_path: Path) -> None:
    step = plan(tmp_path, seconds=3600.0)["extrapolation"]
    assert step.impossible == "it needs text: give --data and --valid"
    step = plan(tmp_path, seconds=3600.0, valid="valid")["extrapolation"]
    assert step.impossible == ""
    config = ROOT / "configs" / "extrapolation_gpu.yaml"
    assert str(config) in step.command
    assert step.command[step.command.index("--jobs") + 1] == "6"
    study, base = load_study(config, overrides_of(step), ExtrapolationStudy)
    study.check_base(base)
    assert base.data.valid[0].prefix == "valid"
