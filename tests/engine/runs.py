"""Small training runs for the tests of the engine: ours on real ranks, and a plain PyTorch loop to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalibi.config import Config, config_from_dict, derive, learning_rate_at
from megalibi.data.dataset import open_dataset
from megalibi.data.loader import Loader
from megalibi.data.token_file import TokenFileWriter
from megalibi.engine.build import build_engine
from megalibi.engine.step import train_step
from megalibi.model import GPT, initialize
from megalibi.parallel import build_process_groups, single_process_groups

VOCAB_SIZE = 509  # prime: padded on every tensor parallel size
Curve = list[tuple[float, float]]
"""Loss and gradient norm of each step."""


def write_tokens(folder: Path, num_tokens: int = 40_000) -> str:
    """Write a token file with something to learn: each token depends on the one before."""
    random = np.random.default_rng(0)
    tokens = np.zeros(num_tokens, np.int64)
    for i in range(1, num_tokens):
        tokens[i] = (tokens[i - 1] * 31 + random.integers(0, 4)) % VOCAB_SIZE
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
    )


def run_ours(config: Config, steps: int) -> tuple[Curve, list[int]]:
    """Train on this rank with DeepSpeed; return the curve and the sample hashes."""
    device = torch.device("cpu")
    groups = build_process_groups(config.parallel.tensor_parallel_size)
    engine = build_engine(config, derive(config, groups.world.size), groups, device)
    loader = open_loader(config, data_rank=groups.data.rank, data_size=groups.data.size)
    curve, hashes = [], []
    for step in range(steps):
        consumed = step * config.train.global_batch_size
        result = train_step(
            engine,
            loader.micro_batches(consumed),
            groups=groups,
            device=device,
            learning_rate=learning_rate_at(step, config.optimizer, config.train.steps),
            seed=config.train.seed,
            samples_consumed=consumed,
        )
        curve.append((result.loss, result.grad_norm))
        hashes.append(result.sample_hash)
    loader.close()
    engine.destroy()
    return curve, hashes


def run_plain(config: Config, steps: int) -> Curve:
    """Train in this process with nothing but PyTorch: the whole global batch at once, no DeepSpeed, no groups."""
    torch.set_num_threads(1)
    model = GPT(
        config.model, padded_vocab_size=derive(config, 1).padded_vocab_size, group=single_process_groups().tensor
    )
    initialize(model, config.model, seed=config.train.seed, group=single_process_groups().tensor)
    o = config.optimizer
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(o.beta1, o.beta2),
        eps=o.epsilon,
    )
    loader = open_loader(config, micro_batch_size=config.train.global_batch_size)
    curve = []
    for step in range(steps):
        (batch,) = loader.micro_batches(step * config.train.global_batch_size)
        loss = model(batch.tokens, batch.labels, cu_seqlens=batch.cu_seqlens).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, o, config.train.steps)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    loader.close()
    return curve
