"""A model that reads tokens once, into a cache; where the cache should have kept more, it reads them again.

Shapes: B batch of rows, V vocabulary.
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
        log_probs_V = self._read()
        if len(tokens) > 1:
            self.cache.trim()
        return log_probs_V

    def read_again(self) -> Tensor:
        """Build the cache again, because a query came that needed forgotten keys; return what ``feed`` returns."""
        self._forget()
        return self._read()

    def _read(self) -> Tensor:
        """Read the tokens that the cache does not have."""
        while (start := self.cache.num_tokens) < len(self.tokens):
            chunk = torch.tensor([self.tokens[start : start + CHUNK_TOKENS]], device=self._device)
            log_probs_V = self.model.next_log_probs(chunk, [self.cache])[0]
            if any(_have_failed([self])):
                self._forget()
        return log_probs_V

    def _forget(self) -> None:
        self.num_rebuilds += 1
        self.cache.reset()


def feed_each(decoders: Sequence[Decoder], tokens: Sequence[int]) -> Tensor:
    """Take the next token of each row in one pass, and return the log-probabilities after each, fp32 [B, V].

    Attention is computed row by row, everything else for all rows at once. A row whose query needs forgotten keys is
    read again alone.

    Args:
        decoders: The rows, of one model. Each has read what it was given so far.
        tokens: The token of each.
    """
    model = decoders[0].model
    for decoder, token in zip(decoders, tokens, strict=True):
        decoder.tokens.append(token)
    tokens_B1 = torch.tensor(tokens, device=next(model.parameters()).device).unsqueeze(1)
    log_probs_BV = model.next_log_probs(tokens_B1, [decoder.cache for decoder in decoders])
    for row, has_failed in enumerate(_have_failed(decoders)):
        if has_failed:
            log_probs_BV[row] = decoders[row].read_again()
    return log_probs_BV


def _have_failed(decoders: Sequence[Decoder]) -> list[bool]:
    """Return for each row whether its cache has failed on any rank of the tensor group."""
    model = decoders[0].model
    have_failed = [decoder.cache.has_failed for decoder in decoders]
    if model.layout.tensor.size == 1:
        return have_failed
    flags = torch.tensor(have_failed, dtype=torch.int64, device=next(model.parameters()).device)
    return [flag > 0 for flag in all_reduce_raw(flags, model.layout.tensor, dist.ReduceOp.MAX).tolist()]
