"""How the next token is chosen: the likeliest, or one drawn from those that temperature, top-k and top-p leave.

Shapes: V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from megalibi.config.checks import check_option, refuse
from megalibi.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What decides the next token beside its probabilities.

    Raises:
        ConfigError: A value is out of its range; the message names the option of the command.
    """

    temperature: float = 1.0
    """What log-probabilities are divided by before a token is drawn; 0 takes the likeliest token."""
    top_k: int | None = None
    """Draw among so many of the likeliest tokens; None: among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability, after temperature and top-k."""
    seed: int = 0
    """Seed of the draws: the same seed, prompt, its number and machine give the same text."""

    def __post_init__(self) -> None:
        check_option("--temperature", self.temperature, 0.0)
        check_option("--top-k", self.top_k, 1)
        check_option("--seed", self.seed, 0)
        if not 0.0 < self.top_p <= 1.0:
            refuse("--top-p", self.top_p, "be above 0 and at most 1")


class Sampler:
    """Draws the tokens of one text.

    Args:
        sampling: How to draw.
        number: The number of the text among those of one command, each of which has draws of its own.
    """

    def __init__(self, sampling: Sampling, number: int = 0) -> None:
        self.sampling, self.number = sampling, number
        # Hashed, so that no text of one seed has the draws of another text of a neighbouring seed.
        digest = hashlib.sha256(f"{sampling.seed}/{number}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))

    def choose(self, log_probs_V: Tensor) -> int:
        """Return the next token.

        Args:
            log_probs_V: The log-probability of each token.

        Raises:
            CheckpointError: They are not numbers.
        """
        log_probs_V = log_probs_V.double().cpu()
        if bool(log_probs_V.isnan().any()):
            raise CheckpointError(
                "the model gives NaN for a probability: give a checkpoint from before the run diverged"
            )
        if self.sampling.temperature == 0.0:
            return int(log_probs_V.argmax())
        # Less the largest, which is then 0 at any temperature: a tiny one would make all of them -inf, and NaN.
        logits_V = (log_probs_V - log_probs_V.max()) / self.sampling.temperature
        probs_V = keep_likeliest(logits_V, self.sampling)
        return int(torch.multinomial(probs_V, 1, generator=self._generator))


def keep_likeliest(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities from which a token is drawn, fp64 [V]: 0 for what top-k and top-p leave out."""
    sorted_V, order_V = logits_V.sort(descending=True, stable=True)
    probs_V = sorted_V[: sampling.top_k].softmax(dim=0)
    # A token stays if those before it have less than top_p: the likeliest always does.
    probs_V = probs_V.where(probs_V.cumsum(dim=0) - probs_V < sampling.top_p, 0.0)
    return torch.zeros_like(logits_V).index_add(0, order_V[: len(probs_V)], probs_V / probs_V.sum())
