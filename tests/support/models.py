"""What the tests of megalibi.model share; it is imported in the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megalibi.config import ModelConfig, padded_vocab_size
from megalibi.model import GPT, initialize
from megalibi.parallel import ALONE, Group, Layout, get_shard_spec, unshard
from tests.support.tensors import full_grad

VOCAB_SIZE = 301
FP32_RELATIVE_ERROR = 2e-6
"""Of sums that are taken in another order; a wrong slice or a missing sum is off by 0.1 or more."""


def make_model(**fields: Any) -> ModelConfig:
    defaults: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "ffn_hidden_size": 96, "vocab_size": VOCAB_SIZE,
        "init_std": 0.2,
    }  # fmt: skip
    return ModelConfig(**{**defaults, **fields})


def build_gpt(model: ModelConfig, group: Group = ALONE, *, sequence_parallel: bool = False, seed: int = 7) -> GPT:
    padded = padded_vocab_size(model.vocab_size, group.size)
    gpt = GPT(model, padded_vocab_size=padded, layout=Layout(group, sequence_parallel))
    initialize(gpt, seed=seed, group=group)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if name.endswith("bias"):  # zeros would hide a wrong one
                parameter.fill_(0.1)
    return gpt


def random_tokens(batch: int, seq_length: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> tuple[Tensor, Tensor]:
    """Tokens and labels, the same on every rank; some labels without loss."""
    stream = torch.randint(vocab_size, (batch, seq_length + 1), generator=torch.Generator().manual_seed(seed))
    labels = stream[:, 1:].clone()
    labels[:, 3] = -100
    return stream[:, :-1], labels


def losses_and_grads(gpt: GPT, **inputs: Any) -> dict[str, Tensor]:
    """Losses, and by name the gradients of the full parameters, for a random upstream gradient."""
    device = next(gpt.parameters()).device
    tokens, labels = (x.to(device) for x in random_tokens(2, 12))
    losses = gpt(tokens, labels, **inputs)
    upstream = torch.randn(losses.shape, generator=torch.Generator().manual_seed(1))
    losses.backward(upstream.to(device))
    grads = {name: _full_grad(parameter, gpt.layout.tensor).clone() for name, parameter in gpt.named_parameters()}
    return {"losses": losses.detach(), **grads}


def _full_grad(parameter: nn.Parameter, group: Group) -> Tensor:
    if group.size > 1:
        return full_grad(parameter, group)
    spec = get_shard_spec(parameter)
    assert parameter.grad is not None
    return parameter.grad if spec is None else unshard([parameter.grad], spec)  # without padding
