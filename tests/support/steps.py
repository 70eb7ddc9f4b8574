"""Real training steps whose memory is measured, for the tests of measuring and planning; imported in the ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megalibi.config import Config, config_from_dict, derive
from megalibi.data.loader import Batch
from megalibi.engine.build import build_engine
from megalibi.engine.step import train_step
from megalibi.parallel import ProcessGroups, products
from megalibi.plan.communication import CollectiveLog, sum_sent_bytes
from megalibi.plan.memory_trace import MemoryByKind, measure_memory
from tests.support.runs import CPU, fp16_support, process_groups

VOCAB_SIZE = 2048


Measured = tuple[MemoryByKind, dict[str, int], int]
"""What a rank held at the peak of a step, what it sent, and its parameters: a tuple, which travels between ranks."""


def make_config(**sections: dict[str, Any]) -> Config:
    """A model whose tensors dominate, and a step of a tenth of a second."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"num_layers": 2, "hidden_size": 256, "num_attention_heads": 8, "ffn_hidden_size": 1024,
                  "vocab_size": VOCAB_SIZE},
        "data": {"train": "none", "seq_length": 256},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"steps": 3, "global_batch_size": 2, "micro_batch_size": 1, "precision": "bf16", "output_dir": "none"},
        "zero": {"bucket_elements": 1_000_000},
    }  # fmt: skip
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    return config_from_dict(tree)


def draw_tokens(config: Config, num_batches: int) -> list[Batch]:
    """Random text whose tokens are as frequent as Zipf's law has them."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_batches, config.train.micro_batch_size, config.data.seq_length + 1)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    tokens: Tensor = (config.model.vocab_size**uniform).long().clamp(max=config.model.vocab_size) - 1
    return [Batch(tokens=t[:, :-1].contiguous(), labels=t[:, 1:].contiguous(), cu_seqlens=None, sample_hash=0)
            for t in tokens]  # fmt: skip


def build_step(config: Config, device: torch.device = CPU) -> tuple[Any, ProcessGroups, Callable[[], object]]:
    """The engine, its groups, and what takes a step."""
    groups = process_groups(config.parallel.tensor_parallel_size)
    with fp16_support(True):
        engine = build_engine(config, derive(config, groups.world.size), groups, device)

    def step() -> object:
        batches = draw_tokens(config, derive(config, groups.world.size).accumulation_steps)
        return train_step(engine, batches, groups=groups, device=device, learning_rate=1e-4, seed=1, samples_consumed=0)

    return engine, groups, step


def with_products_in_16_bits() -> AbstractContextManager[object]:
    """Let products of 16 bits make no fp32 copies on any processor: plans are of devices with instructions for them."""
    return patch.object(products, "_lacks_instructions", lambda _: False)


def measure_steps(configs: list[Config]) -> list[Measured]:
    """Take two steps of each, and measure the second."""
    measured = []
    for config in configs:
        engine, groups, step = build_step(config)
        step()
        with with_products_in_16_bits(), CollectiveLog(tensor=groups.tensor, data=groups.data) as log:
            memory = measure_memory(engine, step, CPU)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        measured.append((memory, sum_sent_bytes(log.collectives), parameters))
        engine.destroy()
    return measured
