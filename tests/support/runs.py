"""Small training runs for the tests of the engine: ours on real ranks, and a plain PyTorch loop to compare with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from fused_ops import fusing
from megalibi.checkpoint import find_left_out
from megalibi.config import Config, config_from_dict, derive, learning_rate_at
from megalibi.data.dataset import open_dataset
from megalibi.data.loader import Batch, Loader
from megalibi.data.provenance import identify_data
from megalibi.data.tokenizer.tokenizer import load_tokenizer
from megalibi.data.tokens.identity import DataIdentity
from megalibi.data.tokens.token_file import TokenFile, TokenFileWriter
from megalibi.engine.build import build_engine
from megalibi.engine.step import StepResult, train_step
from megalibi.model import GPT, initialize
from megalibi.parallel import IGNORED_LABEL, WHOLE, ProcessGroups, build_process_groups
from tests.support.device import DEVICE

VOCAB_SIZE = 509  # prime: padded on every tensor parallel size
STAGES = (0, 1, 2, 3)
CPU = torch.device("cpu")
HERE = torch.device(DEVICE)
"""Where the runs compute: TEST_DEVICE."""
Curve = list[tuple[float, float]]
"""Loss and gradient norm of each step."""


@cache
def _draw_tokens(num_tokens: int) -> np.ndarray:
    random = np.random.default_rng(0)
    tokens = np.zeros(num_tokens, np.int64)
    for i in range(1, num_tokens):
        tokens[i] = (tokens[i - 1] * 31 + random.integers(0, 4)) % VOCAB_SIZE
    return tokens


def write_tokens(folder: Path, num_tokens: int = 40_000) -> str:
    """Write a token file with something to learn: each token depends on the one before."""
    tokens = _draw_tokens(num_tokens)
    prefix = str(folder / "tokens")
    with TokenFileWriter(prefix, VOCAB_SIZE) as writer:
        for start in range(0, num_tokens, 997):
            writer.add_document(tokens[start : start + 997])
    return prefix


def make_config(prefix: str, **sections: dict[str, Any]) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "model": {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "ffn_hidden_size": 96,
                  "vocab_size": VOCAB_SIZE, "init_std": 0.05},
        "data": {"train": prefix, "seq_length": 33},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 3, "clip_grad_norm": 0.5},
        "train": {"steps": 30, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32",
                  "output_dir": "none"},
        "zero": {"bucket_elements": 20_000},
    }  # fmt: skip
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    return config_from_dict(tree)


def identify(config: Config) -> DataIdentity:
    train, valid = ([TokenFile(d.prefix) for d in split] for split in (config.data.train, config.data.valid))
    return identify_data(train, valid, config.data.tokenizer and load_tokenizer(config.data.tokenizer))


def open_loader(config: Config, *, data_rank: int = 0, data_size: int = 1, micro_batch_size: int = 0) -> Loader:
    dataset = open_dataset(
        [(d.prefix, d.weight) for d in config.data.train],
        seq_length=config.data.seq_length,
        seed=config.train.seed,
        vocab_size=config.model.vocab_size,
    )
    return Loader(
        dataset,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=micro_batch_size or config.train.micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
        document_mask=config.data.document_mask,
        left_out=find_left_out(config),
    )


@cache
def process_groups(tensor_parallel_size: int) -> ProcessGroups:
    """Groups of the running ranks, built once: torch keeps every group that was ever made."""
    return build_process_groups(tensor_parallel_size)


@contextmanager
def fp16_support(is_supported: bool) -> Iterator[None]:
    """Answer DeepSpeed's question whether the device has fp16: CPUs without instructions for it compute it slowly."""
    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: is_supported
    try:
        yield
    finally:
        del accelerator.is_fp16_supported


def build(config: Config) -> tuple[DeepSpeedEngine, ProcessGroups]:
    groups = process_groups(config.parallel.tensor_parallel_size)
    return build_engine(config, derive(config, groups.world.size), groups, HERE), groups


def mask_by_content(batch: Batch) -> Batch:
    """Take the loss off some tokens: rows keep 33 to none of theirs, so that every rank and micro batch differs."""
    places = torch.arange(batch.tokens.shape[1])
    first_with_loss = batch.tokens[:, :1] % 50
    return dataclasses.replace(batch, labels=batch.labels.masked_fill(places < first_with_loss, IGNORED_LABEL))


def iterate_ours(
    config: Config, steps: int, *, mask_labels: bool = False
) -> Iterator[tuple[DeepSpeedEngine, StepResult]]:
    """Train on this rank with DeepSpeed; yield after every step."""
    engine, groups = build(config)
    loader = open_loader(config, data_rank=groups.data.rank, data_size=groups.data.size)
    for step in range(steps):
        consumed = step * config.train.global_batch_size
        batches = loader.micro_batches(consumed)
        result = train_step(
            engine,
            [mask_by_content(batch) for batch in batches] if mask_labels else batches,
            groups=groups,
            device=HERE,
            learning_rate=learning_rate_at(step, config.optimizer, config.train.steps),
            seed=config.train.seed,
            samples_consumed=consumed,
        )
        yield engine, result
    loader.close()
    engine.destroy()


def run_ours(configs: list[Config], steps: int, *, mask_labels: bool = False) -> list[list[StepResult]]:
    """Train on this rank with DeepSpeed, one run after the other."""
    return [[result for _, result in iterate_ours(config, steps, mask_labels=mask_labels)] for config in configs]


def curve_of(results: list[StepResult]) -> Curve:
    return [(result.loss, result.grad_norm) for result in results]


class PlainNag(torch.optim.Optimizer):
    """fairseq's nag, written down from its formula: the momentum holds the learning rate, corrected when that moves."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            correction = rate / group.get("old_rate", rate)
            for weight in group["params"]:
                buffer = self.state[weight].setdefault("buffer", torch.zeros_like(weight))
                weight *= 1 - rate * group["weight_decay"]
                weight += momentum**2 * correction * buffer - (1 + momentum) * rate * weight.grad
                buffer.mul_(momentum * correction).sub_(rate * weight.grad)
            group["old_rate"] = rate


def clip_in_fp64(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Clip as torch's clip_grad_norm_ does, by a norm that is summed in fp64 (trap 17); return the norm."""
    norms = [parameter.grad.double().norm() for parameter in parameters if parameter.grad is not None]
    norm = torch.stack(norms).norm()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()


def run_plain(config: Config, steps: int, *, mask_labels: bool = False, with_kernels: bool = False) -> Curve:
    """Train in this process with nothing but PyTorch: the whole global batch at once, no DeepSpeed, no groups.

    Cross entropy and layer norms are PyTorch's on a GPU too, where those of a run of ours are kernels; with
    ``with_kernels`` they are what a run of ours has, for comparisons that are closer than another order of sums allows.
    """
    with nullcontext() if with_kernels else fusing(False):
        return _run_plain(config, steps, mask_labels)


def _run_plain(config: Config, steps: int, mask_labels: bool) -> Curve:
    torch.set_num_threads(1)
    with HERE:
        model = GPT(config.model, padded_vocab_size=derive(config, 1).padded_vocab_size, layout=WHOLE)
    initialize(model, seed=config.train.seed, group=WHOLE.tensor)
    o = config.optimizer
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.dim() > 1 and not name.startswith("positions.") else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer
    if o.kind == "nesterov":
        optimizer = PlainNag(groups, {"momentum": o.momentum})
    else:
        optimizer = torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.epsilon)
    loader = open_loader(config, micro_batch_size=config.train.global_batch_size)
    curve = []
    for step in range(steps):
        (batch,) = loader.micro_batches(step * config.train.global_batch_size)
        batch = mask_by_content(batch) if mask_labels else batch
        cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.to(HERE)
        losses = model(batch.tokens.to(HERE), batch.labels.to(HERE), cu_seqlens=cu_seqlens)
        loss = losses.double().sum() / (batch.labels != IGNORED_LABEL).sum()
        optimizer.zero_grad()
        loss.backward()
        norm = clip_in_fp64(list(model.parameters()), o.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, o, config.train.steps)
        optimizer.step()
        curve.append((loss.item(), norm))
    loader.close()
    return curve


def largest_relative_difference(curve: Curve, curve_ref: Curve) -> float:
    a, b = np.array(curve), np.array(curve_ref)
    assert a.shape == b.shape
    return float(np.max(np.abs(a - b) / np.abs(b)))
