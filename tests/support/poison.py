"""Runs that meet a number that is not finite by real means: the embedding of a token that one rank's data alone has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from megalibi.config import Config
from megalibi.engine.masters import find_masters, hand_out_weights
from tests.support.runs import build, open_loader
from tests.support.saving import save


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
