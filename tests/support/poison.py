"""Runs that meet bad numbers by real means: an embedding that is not a number, of a token that one rank alone has,
and stretches of text that are like no other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from megalibi.config import Config, load_config
from megalibi.data.dataset import open_dataset
from megalibi.data.tokens.token_file import TokenFileWriter
from megalibi.engine.masters import find_masters, hand_out_weights
from tests.support.jobs import write_job
from tests.support.ranks import run_on_ranks
from tests.support.runs import VOCAB_SIZE, build, open_loader
from tests.support.saving import save

BAD_STEP = 3
"""The step, counted from 0, in which rank 1 of 2 meets a token whose embedding is not a number."""
BATCH = 4
POISONED_BATCHES = (13, 19)
"""Batches of the order, counted from 0, whose text is of tokens that are nowhere else."""


def write_job_with_a_bad_embedding(folder: Path, steps: int) -> Path:
    """Write a job in whose step BAD_STEP rank 1 of 2 meets an embedding that is not a number; return its config."""
    path = write_job(
        folder,
        model={"tie_embeddings": False},
        train={"steps": steps, "micro_batch_size": 1},
        checkpoint={"every_steps": 2, "keep": 0},
    )
    config = load_config(path)
    token = find_token(config, step=BAD_STEP, steps=steps + 2)
    (checkpoint,) = run_on_ranks(1, save_poisoned, config, str(folder / "poisoned"), token)
    path.write_text(path.read_text().replace("resume: auto", f"resume: {checkpoint}"))
    return path


def write_job_with_bad_text(folder: Path) -> Path:
    """Write a job whose text is learned in a few steps, but for two of its batches; return its config."""
    path = write_job(
        folder,
        optimizer={"learning_rate": 1e-2, "warmup_steps": 0},
        train={
            "steps": 20,
            "micro_batch_size": 2,
            "on_spike": "rollback",
            "spike_window": 6,
            "spike_deviations": 4.0,
            "max_rollbacks": 1,
        },
        checkpoint={"every_steps": 4, "keep": 0},
        model={"dropout": 0.1},
    )
    config = load_config(path)
    prefix, length = config.data.train[0].prefix, config.data.seq_length
    tokens = np.tile(np.arange(8), 2_500)
    with TokenFileWriter(prefix, VOCAB_SIZE) as writer:
        writer.add_document(tokens)
    dataset = open_dataset(prefix, seq_length=length, seed=config.train.seed, vocab_size=VOCAB_SIZE)
    for batch in POISONED_BATCHES:
        for place in dataset.sample_ids(np.arange(batch * BATCH, (batch + 1) * BATCH))[:, 1].tolist():
            tokens[place * length + 1 : (place + 1) * length] = np.random.default_rng(place).integers(
                100, VOCAB_SIZE, length - 1
            )
    with TokenFileWriter(prefix, VOCAB_SIZE) as writer:
        writer.add_document(tokens)
    return path


def list_tokens(config: Config, steps: Iterable[int], data_ranks: Sequence[int], data_size: int) -> set[int]:
    """Return the tokens that some ranks feed to the model in some steps, counted from 0."""
    found: set[int] = set()
    for data_rank in data_ranks:
        loader = open_loader(config, data_rank=data_rank, data_size=data_size)
        for step in steps:
            for batch in loader.micro_batches(step * config.train.global_batch_size):
                found |= set(batch.tokens.flatten().tolist())
        loader.close()
    return found


def find_token(config: Config, *, step: int, steps: int) -> int:
    """Return a token that rank 1 of 2 alone meets, in one of the steps, and in no other."""
    only = list_tokens(config, [step], [1], 2) - list_tokens(config, [step], [0], 2)
    others = [other for other in range(steps) if other != step]
    return min(only - list_tokens(config, others, [0, 1], 2))


def write_embedding(engine: DeepSpeedEngine, config: Config, token: int, value: float) -> None:
    """Write a number into a token's embedding, in what the optimizers hold and in what the model computes with."""
    width = config.model.hidden_size
    for master in find_masters(engine, config.optimizer.kind):
        if master.name == "embedding.weight":
            first, last = (
                min(max(place - master.start, 0), len(master.weight)) for place in (token * width, (token + 1) * width)
            )
            master.weight[first:last] = value
    if engine.zero_optimization_stage() > 0:
        hand_out_weights(engine)


def save_poisoned(config: Config, folder: str, token: int) -> str:
    """Write a checkpoint of no steps in which the embedding of a token is not a number; return its folder."""
    engine, groups = build(config)
    with torch.no_grad():
        write_embedding(engine, config, token, math.nan)
    path = save(config, engine, groups, folder, 0)
    engine.destroy()
    return str(path)
