"""Source and target on the same text: the logits of a model of ours, and how far another program's are from them.

Shapes: S tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from importlib import resources
from typing import NamedTuple

import torch
from torch import Tensor

from megalibi.checkpoint import Checkpoint
from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.words import WordTokenizer
from megalibi.errors import FileError
from megalibi.export.certificate import LogitComparison

_RANDOM_SEED = 1234
_TEXT_FILE = "license.txt"
_ROWS = 256
"""Rows of probabilities that exist at once."""


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


def compute_our_log_probs(checkpoint: Checkpoint, tokens_S: Tensor) -> Tensor:
    """Return the log-probabilities of every next token, fp32 [S, V], by the fp32 weights on the CPU.

    Args:
        checkpoint: The checkpoint; whatever the precision of its run, it is computed in fp32.
        tokens_S: Token ids.

    Raises:
        CheckpointError: A file is missing, damaged, would run code, or does not hold what the manifest says.
        FileError: A file may not be read.
    """
    fields = {**checkpoint.manifest.config, "train": {**checkpoint.manifest.config["train"], "precision": "fp32"}}
    in_fp32 = dataclasses.replace(checkpoint, manifest=dataclasses.replace(checkpoint.manifest, config=fields))
    return in_fp32.load_model(torch.device("cpu")).log_probs(tokens_S[None])[0]


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
    source_SV, target_SV = source_SV[:, :vocab_size], target_SV[:, :vocab_size]
    centred = [
        logits_SV - logits_SV.mean(-1, keepdim=True, dtype=torch.float64) for logits_SV in (source_SV, target_SV)
    ]
    return LogitComparison(
        software=software,
        text=text.description,
        tokens=len(text.tokens),
        largest_logit_difference=(centred[0] - centred[1]).abs().max().item(),
        source_perplexity=_compute_perplexity(source_SV, text.tokens),
        target_perplexity=_compute_perplexity(target_SV, text.tokens),
        largest_probability_difference=_compute_probability_difference(source_SV, target_SV),
    )


def check_probabilities(comparison: LogitComparison, what: str, bound: float) -> None:
    """Check that the probabilities of source and target agree, for software that does not compute in fp32 throughout.

    Args:
        comparison: What was compared.
        what: The target's software.
        bound: The largest difference that is allowed.

    Raises:
        FileError: They do not agree.
    """
    difference = comparison.largest_probability_difference
    if not difference <= bound:
        raise FileError(
            f"{what} computes other probabilities than the source, by up to {difference:.1e}, where at most "
            f"{bound:.0e} is allowed: nothing is kept"
        )


def _compute_probability_difference(source_SV: Tensor, target_SV: Tensor) -> float:
    pairs = zip(source_SV.split(_ROWS), target_SV.split(_ROWS), strict=True)
    return max((ours.double().softmax(-1) - theirs.double().softmax(-1)).abs().max().item() for ours, theirs in pairs)


def _compute_perplexity(logits_SV: Tensor, tokens_S: Tensor) -> float:
    log_probs_SV = logits_SV[:-1].double().log_softmax(-1)
    return float((-log_probs_SV.gather(1, tokens_S[1:, None]).mean()).exp())
