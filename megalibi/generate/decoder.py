"""A model that reads tokens once, into a cache; where the cache should have kept more, it reads them again.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megalibi.model import GPT, KeyValueCache
from megalibi.parallel import all_reduce_raw

CHUNK_TOKENS = 512
"""Most tokens of one forward pass, which bounds the memory that a long prompt takes beside its cache."""
DEFAULT_HORIZON_EPS = 2.0**-24
"""Half a rounding step of fp32, as of attention itself."""


class Decoder:
    """One row of tokens that grows, and the log-probabilities of its next token.

    Every rank of the model's tensor group has one and is given the same tokens.

    Args:
        model: The model, with this rank's slices of its parameters.
        horizon_eps: Largest share of a query's attention that may be lost in a head because its keys are forgotten;
            0 keeps all keys.
    """

    def __init__(self, model: GPT, *, horizon_eps: float = DEFAULT_HORIZON_EPS) -> None:
        self.model = model
        self.cache = KeyValueCache(len(model.blocks), horizon_eps=horizon_eps)
        self.tokens: list[int] = []
        self.num_rebuilds = 0
        """How often the cache had to be built again, because a query came that needed forgotten keys."""
        self._device = next(model.parameters()).device

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Take the next tokens, one or more, and return the log-probabilities of the token after them, fp32 [V].

        They are those that a cache of all keys would give, but for ``horizon_eps`` of each head's attention.
        """
        assert len(tokens) > 0
        self.tokens.extend(tokens)
        while (start := self.cache.num_tokens) < len(self.tokens):
            chunk = torch.tensor([self.tokens[start : start + CHUNK_TOKENS]], device=self._device)
            log_probs_V = self.model.next_log_probs(chunk, self.cache)[0]
            if self._any_rank_failed():
                self.num_rebuilds += 1
                self.cache.reset()
        if len(tokens) > 1:
            self.cache.trim()
        return log_probs_V

    def _any_rank_failed(self) -> bool:
        group = self.model.layout.tensor
        has_failed = self.cache.has_failed
        if group.size == 1:
            return has_failed
        flag = torch.tensor(int(has_failed), device=self._device)
        return bool(all_reduce_raw(flag, group, dist.ReduceOp.MAX))
