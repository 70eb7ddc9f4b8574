"""From a prompt to a text, a token at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalibi.config import ModelConfig
from megalibi.config.checks import refuse
from megalibi.errors import DataError
from megalibi.generate.decoder import Decoder
from megalibi.generate.sampling import Sampler
from megalibi.parallel import Group, all_reduce_raw


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The tokens that followed a prompt, and what they took."""

    tokens: tuple[int, ...]
    """The generated tokens, without the one that ended the document."""
    ended: bool
    """Whether the model ended the document, before ``max_tokens`` were generated."""
    prompt_seconds: float
    """How long the prompt took, up to the probabilities of the first token."""
    seconds: float
    """How long the generated tokens took after that."""


def check_room(model: ModelConfig, num_prompt_tokens: int, max_tokens: int) -> None:
    """Check before the work that the model has a position for every token.

    The last token that is generated is not read by the model, and needs none.

    Raises:
        ConfigError: It has learned fewer.
    """
    cap = model.max_position_embeddings
    if cap and num_prompt_tokens + max_tokens - 1 > cap:
        left = cap - num_prompt_tokens + 1
        room = f"be at most {left}" if left > 0 else "stand beside a shorter prompt"
        refuse(
            "--max-tokens",
            max_tokens,
            f"{room}: the prompt has {num_prompt_tokens} tokens, and model.position_method={model.position_method} of "
            f"the checkpoint has learned model.max_position_embeddings={cap} positions",
        )


def check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    """Check before the work that the model knows every token of a prompt.

    Raises:
        DataError: It does not.
    """
    if max(prompt) >= vocab_size:
        raise DataError(
            f"the prompt has the token {max(prompt)}: must be below model.vocab_size={vocab_size} of the checkpoint; "
            "name its own tokenizer with --tokenizer"
        )


def generate(
    decoder: Decoder,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    max_tokens: int,
    num_tokens: int,
    end_of_document_id: int,
    show: Callable[[int], None] = lambda token: None,
) -> Generation:
    """Generate up to ``max_tokens`` tokens, or up to the end of the document.

    Every rank of the model's tensor group calls it, with the same arguments; the first one chooses for all.

    Args:
        decoder: The model, with an empty cache.
        prompt: One token or more.
        sampler: Chooses each token.
        max_tokens: Most tokens to generate.
        num_tokens: How many tokens the tokenizer has; the model may have more, which are no text and never chosen.
        end_of_document_id: The token that ends the text; -1: none does.
        show: Called with each token as soon as it is known.
    """
    group = decoder.model.layout.tensor
    start = time.perf_counter()
    log_probs_V = decoder.feed(prompt)
    after_prompt = time.perf_counter()
    tokens: list[int] = []
    ended = False
    while len(tokens) < max_tokens:
        token = _choose_together(log_probs_V[:num_tokens], sampler, group)
        ended = token == end_of_document_id
        if ended:
            break
        tokens.append(token)
        show(token)
        if len(tokens) < max_tokens:
            log_probs_V = decoder.feed([token])
    return Generation(
        tokens=tuple(tokens),
        ended=ended,
        prompt_seconds=after_prompt - start,
        seconds=time.perf_counter() - after_prompt,
    )


def describe_generation(done: Generation, decoder: Decoder, num_prompt_tokens: int) -> str:
    """Return in one line what a text took."""
    kept = [tokens for layer in decoder.cache.kept_tokens() for tokens in layer]
    share = sum(kept) / (len(kept) * max(1, decoder.cache.num_tokens))
    whose = "cache" if decoder.model.layout.tensor.size == 1 else "cache of this rank's heads"
    rate = (len(done.tokens) - 1) / done.seconds if len(done.tokens) > 1 else 0.0
    return (
        f"{num_prompt_tokens:,} tokens of the prompt in {done.prompt_seconds:.2f} s, {len(done.tokens):,} generated at "
        f"{rate:,.1f} tokens/s; the {whose} has {decoder.cache.memory_bytes() / 1e6:.1f} MB and keeps {share:.0%} of "
        f"all keys, rebuilt {decoder.num_rebuilds} times"
    )


def _choose_together(log_probs_V: Tensor, sampler: Sampler, group: Group) -> int:
    """Return the token that the group's first rank chooses: on other devices last bits may differ."""
    token = sampler.choose(log_probs_V)
    if group.size == 1:
        return token
    return int(all_reduce_raw(torch.tensor(token if group.rank == 0 else 0, device=log_probs_V.device), group))
