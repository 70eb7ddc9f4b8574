"""Source and target on the same text: the logits of a model of ours, and how far another program's are from them.

Shapes: S tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from importlib import resources
from typing import NamedTuple

import torch
from torch import Tensor

from megalibi.checkpoint import Checkpoint
from megalibi.checkpoint.writing.host_memory import measure_available_bytes
from megalibi.config import Config
from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.words import WordTokenizer
from megalibi.errors import ConfigError
from megalibi.export.certificate import LogitComparison
from megalibi.model import count_parameters
from megalibi.units import format_bytes

_MODEL_BYTES = 8
"""Of each parameter: two models in fp32."""
_LOGIT_BYTES = 12
"""Of each token of the text and each of the vocabulary: logits of both sides, and what a softmax makes of one."""
_SCORE_BYTES = 20
"""Of each pair of tokens and each head: a layer's scores, bias, mask and softmax, in a class without a fused attention.
"""
_RANDOM_SEED = 1234
_TEXT_FILE = "license.txt"
_COMPARED_AT_ONCE = 1 << 20
"""Logits that are compared at once, in whole rows: the fp64 copies are of no more."""
_MAX_EXPONENT = 700.0
"""The largest loss whose perplexity fp64 has; a certificate holds numbers alone."""


class ComparisonText(NamedTuple):
    """The tokens on which source and target are compared."""

    tokens: Tensor
    """The ids of the tokens, int64 [S]."""
    description: str
    """What they are, for the certificate."""


def choose_text(num_tokens: int, vocab_size: int, tokenizer: Tokenizer | WordTokenizer | None) -> ComparisonText:
    """Return so many tokens of a text that every installation has; without a tokenizer random ones.

    Args:
        num_tokens: The number of tokens, S.
        vocab_size: All ids are below it.
        tokenizer: That of the model; None: it is not at hand.
    """
    if tokenizer is not None:
        text = resources.files("megalibi.export").joinpath(_TEXT_FILE).read_text(encoding="utf-8")
        ids = [token for token in tokenizer.encode(text) if token < vocab_size]
        if ids:
            repeats = math.ceil(num_tokens / len(ids))
            tokens_S = torch.tensor((ids * repeats)[:num_tokens])
            again = f", {repeats} times over" if repeats > 1 else ""
            return ComparisonText(tokens_S, f"the Apache License 2.0 by the model's tokenizer{again}")
    generator = torch.Generator().manual_seed(_RANDOM_SEED)
    tokens_S = torch.randint(vocab_size, (num_tokens,), generator=generator)
    return ComparisonText(tokens_S, f"random ids of seed {_RANDOM_SEED}, for no tokenizer was at hand")


def check_comparison_memory(config: Config, *, compare: bool = True) -> None:
    """Check before the work of a conversion that both models and their logits at the end find room on this host.

    Args:
        config: Of the model, and of how long its texts were: twice as many tokens are compared.
        compare: Whether they will be run.

    Raises:
        ConfigError: They do not; the sizes are named.
    """
    if not compare:
        return
    tokens, model = 2 * config.data.seq_length, config.model
    needed = _MODEL_BYTES * count_parameters(model) + _LOGIT_BYTES * tokens * model.vocab_size
    needed += _SCORE_BYTES * tokens * tokens * model.num_attention_heads
    if needed > (available := measure_available_bytes()):
        raise ConfigError(
            f"comparing source and target at {tokens:,} tokens takes about {format_bytes(needed)}, and this host has "
            f"{format_bytes(available)} of memory left: give --no-compare, which the certificate will say"
        )


def compute_our_log_probs(
    checkpoint: Checkpoint, tokens_S: Tensor, store: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return the log-probabilities of every next token, fp32 [S, V], by the fp32 weights on the CPU.

    Args:
        checkpoint: The checkpoint, verified; whatever the precision of its run, it is computed in fp32.
        tokens_S: Token ids.
        store: What a target keeps of a parameter, in fp32; None: all of it.

    Raises:
        CheckpointError: A file does not hold what the manifest says.
        FileError: A file may not be read.
    """
    fields = {**checkpoint.manifest.config, "train": {**checkpoint.manifest.config["train"], "precision": "fp32"}}
    in_fp32 = dataclasses.replace(checkpoint, manifest=dataclasses.replace(checkpoint.manifest, config=fields))
    model = in_fp32.load_model(torch.device("cpu"), is_verified=True)
    if store is not None:
        for parameter in model.parameters():
            parameter.copy_(store(parameter))
    return model.log_probs(tokens_S[None])[0]


def compare_logits(
    source_SV: Tensor, target_SV: Tensor, text: ComparisonText, *, software: str, vocab_size: int
) -> LogitComparison:
    """Return how far the logits of source and target are apart.

    Args:
        source_SV: Logits of the source, up to a number for each row, which no probability depends on.
        target_SV: Logits of the target, likewise.
        text: The tokens.
        software: What ran the side that is not ours, with its version.
        vocab_size: The number of ids that both have.
    """
    logit_difference = probability_difference = 0.0
    losses: tuple[list[float], list[float]] = [], []
    # A row's losses are of the token after it: the last row has none.
    rows = max(1, _COMPARED_AT_ONCE // vocab_size)
    pieces = zip(source_SV.split(rows), target_SV.split(rows), text.tokens.roll(-1).split(rows), strict=True)
    for source, target, next_tokens in pieces:
        ours, theirs = (logits[:, :vocab_size].double() for logits in (source, target))
        centred = [logits - logits.mean(-1, keepdim=True) for logits in (ours, theirs)]
        logit_difference = _max(logit_difference, centred[0] - centred[1])
        log_probs = [logits.log_softmax(-1) for logits in (ours, theirs)]
        probability_difference = _max(probability_difference, log_probs[0].exp() - log_probs[1].exp())
        for found, values in zip(losses, log_probs, strict=True):
            found.extend((-values.gather(1, next_tokens[:, None])[:, 0]).tolist())
    return LogitComparison(
        software=software,
        text=text.description,
        tokens=len(text.tokens),
        largest_logit_difference=logit_difference,
        source_perplexity=_compute_perplexity(losses[0][:-1]),
        target_perplexity=_compute_perplexity(losses[1][:-1]),
        largest_probability_difference=probability_difference,
    )


def _max(so_far: float, differences: Tensor) -> float:
    """Return the larger of a difference and the largest of a tensor; not a number if one of them is none."""
    return torch.maximum(torch.tensor(so_far, dtype=torch.float64), differences.abs().max()).item()


def _compute_perplexity(losses: list[float]) -> float:
    mean = math.fsum(losses) / len(losses)
    return math.exp(min(mean, _MAX_EXPONENT))
