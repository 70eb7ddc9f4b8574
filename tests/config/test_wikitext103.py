"""The paper's WikiText-103 model is the paper's: its parameters, its rates, and a small copy of it learns."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from megalibi.config import adaptive_bands, derive, learning_rate_at, load_config
from megalibi.engine.step import StepResult
from megalibi.model import GPT, count_parameters
from megalibi.parallel import WHOLE
from tests.support.ranks import run_on_ranks
from tests.support.runs import run_ours, write_tokens

PATH = Path(__file__).parents[2] / "configs" / "wikitext103_alibi_512.yaml"
PAPER_PARAMETERS = 247e6
"""arXiv:2108.12409, tables 6 and 7, to the million."""
# The scaled-down run: a fourteenth of the width, the vocabulary of the test's tokens, and no GPU.
SMALL = [
    "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4", "model.ffn_hidden_size=256",
    "model.vocab_size=509", "model.adaptive_cutoffs=[64,192]", "data.seq_length=32", "data.valid=null",
    "data.tokenizer=null", "optimizer.warmup_steps=10", "train.steps=120", "train.global_batch_size=16",
    "train.micro_batch_size=16", "train.precision=fp32",
]  # fmt: skip
STEPS = 120


def test_it_has_the_papers_247_million_parameters() -> None:
    model = load_config(PATH).model
    assert [(band.size, band.width) for band in adaptive_bands(model)] == [(20_000, 1024), (40_000, 256), (207_744, 64)]
    assert count_parameters(model) == 246_933_504
    assert round(count_parameters(model), -6) == PAPER_PARAMETERS
    with torch.device("meta"):
        gpt = GPT(model, padded_vocab_size=model.vocab_size, layout=WHOLE)
    assert sum(parameter.numel() for parameter in gpt.parameters()) == count_parameters(model)


def test_its_batch_and_epochs_are_the_papers() -> None:
    config = load_config(PATH)
    derived = derive(config, 8)
    assert (derived.accumulation_steps, derived.batch_tokens) == (1, 8 * 9216)
    assert round(config.train.steps * derived.batch_tokens / 103_227_021) == 204  # the paper's 205
    rates = [learning_rate_at(step, config.optimizer, config.train.steps) for step in (0, 15_999, 151_000, 286_000)]
    assert rates == pytest.approx([1e-7 + 1 / 16_000, 1.0, 0.5, 1e-4], rel=1e-3)


def test_a_small_copy_of_it_learns(tmp_path: Path) -> None:
    config = load_config(PATH, [*SMALL, f"data.train={write_tokens(tmp_path)}", f"train.output_dir={tmp_path}"])
    assert 100_000 < count_parameters(config.model) < 1_000_000
    assert config.optimizer == dataclasses.replace(load_config(PATH).optimizer, warmup_steps=10)
    results: list[StepResult] = run_on_ranks(1, run_ours, [config], STEPS)[0][0]
    last = sum(result.loss for result in results[-10:]) / 10
    assert last < math.log(config.model.vocab_size) - 0.5  # uniform guessing has ln V; 1.0 less was seen
    assert min(result.grad_norm for result in results) > config.optimizer.clip_grad_norm  # as the paper clips: always
