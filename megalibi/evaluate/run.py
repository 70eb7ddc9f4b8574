"""One checkpoint on one text: what is checked before, and the numbers at each length.

Shapes: S positions in the window.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from megalibi.config import Config
from megalibi.data.provenance import check_tokenizer
from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.words import WordTokenizer
from megalibi.data.tokens.token_file import TokenFile, check_ids
from megalibi.errors import ConfigError
from megalibi.evaluate.losses import stream_loss
from megalibi.evaluate.result import EvaluationResult
from megalibi.metrics.memory import memory_peak_bytes
from megalibi.parallel import ProcessGroups, all_reduce_raw

_CHECK_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What stays the same from the first length to the last."""

    model: nn.Module
    """Of the checkpoint; this rank's slices of it."""
    text: TokenFile
    """What is scored."""
    num_tokens: int
    """How much of it."""
    num_bytes: int | None
    """Bytes of text behind the scored tokens; None: not known."""
    stride: int | None
    """Tokens between windows; None: they do not overlap."""
    groups: ProcessGroups
    """Of this process; the data ranks share the windows."""
    device: torch.device
    """Where it computes."""


def check_lengths(config: Config, lengths: list[int]) -> None:
    """Find out before the work whether the model can see so many tokens at once.

    Raises:
        ConfigError: A length is past the last position that the model has learned.
    """
    cap = config.model.max_position_embeddings
    if cap and max(lengths) > cap:
        raise ConfigError(
            f"--lengths={max(lengths)} is not allowed: the checkpoint has model.position_method="
            f"{config.model.position_method} and model.max_position_embeddings={cap}, so at most {cap} is"
        )


def check_tensor_parallel_size(config: Config, size: int, world_size: int) -> None:
    """Find out before the work whether so many ranks can share the model.

    Raises:
        ConfigError: They do not divide the ranks, the heads or the feed-forward width.
    """
    if size < 1:
        raise ConfigError(f"--tensor-parallel-size={size} is not allowed: 1 or more is")
    shared = {
        "the number of ranks": world_size,
        "model.num_attention_heads": config.model.num_attention_heads,
        "model.ffn_hidden_size": config.model.ffn_hidden_size,
    }
    for name, value in shared.items():
        if value % size:
            raise ConfigError(f"--tensor-parallel-size={size} does not divide {name}={value}")


def check_same_tokenizer(
    trained: Mapping[str, Any],
    text: TokenFile | None,
    tokenizer: Tokenizer | WordTokenizer | None,
    option: str = "--tokenizer",
) -> None:
    """Find out before the work whether text and model know the same ids: another vocabulary's would be scored as well.

    Args:
        trained: ``data`` of the checkpoint's manifest.
        text: What would be scored, if it is a token file.
        tokenizer: Of the text, if one is at hand.
        option: What named the tokenizer.

    Raises:
        ConfigError: They do not.
    """
    sha256 = check_tokenizer([] if text is None else [text], tokenizer, option)
    if sha256 is not None and trained.get("tokenizer_sha256") not in (None, sha256):
        what = f"{option}={tokenizer.path}" if tokenizer is not None else f"the tokenizer of {text and text.prefix}"
        raise ConfigError(
            f"{what} (sha256 {sha256[:12]}) is not the tokenizer that the checkpoint was trained with (sha256 "
            f"{trained['tokenizer_sha256'][:12]}): tokenize the text with that one"
        )


def check_and_measure(text: TokenFile, num_tokens: int, vocab_size: int, tokenizer: Tokenizer | None) -> int | None:
    """Check every token that will be used, and return the bytes of text of those that are scored.

    Raises:
        ConfigError: A token is past the vocabulary of the model or of the tokenizer.
    """
    num_bytes = 0
    for start in range(0, num_tokens, _CHECK_TOKENS):
        tokens = text.read(start, min(_CHECK_TOKENS, num_tokens - start))
        check_ids(tokens, vocab_size, text, start)
        if tokenizer is not None:
            check_ids(tokens, tokenizer.vocab_size, text, start)
            num_bytes += int(tokenizer.text_bytes[tokens].sum())
    if tokenizer is None:
        return None
    return num_bytes - int(tokenizer.text_bytes[text.read(0, 1)].sum())  # the first token is not scored


def evaluate(
    evaluation: Evaluation, length: int, show: Callable[[int, float], None]
) -> tuple[EvaluationResult, NDArray[np.float64]]:
    """Score the text at one length; every rank gets the numbers of all ranks.

    Args:
        evaluation: What is evaluated.
        length: Tokens the model sees at once.
        show: Called after each forward pass with the tokens scored so far and their mean loss.

    Returns:
        The result, and summed loss and scored tokens by position in the window, [2, S].

    Raises:
        ConfigError: The loss is no number.
    """
    device, groups = evaluation.device, evaluation.groups
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    sums_2S, start = np.zeros((2, length)), time.perf_counter()
    for turn_2S in stream_loss(
        evaluation.model,
        evaluation.text,
        length,
        evaluation.stride,
        evaluation.num_tokens,
        device=device,
        data=groups.data,
    ):
        sums_2S += turn_2S.numpy()
        loss_sum, scored = sums_2S.sum(1).tolist()
        show(int(scored), loss_sum / scored)
    loss = loss_sum / scored
    if not math.isfinite(loss):
        raise ConfigError(f"the loss at length {length} is {loss}: the checkpoint's model does not compute numbers")
    seconds = time.perf_counter() - start
    peak = torch.tensor(memory_peak_bytes(device), device=device)
    result = EvaluationResult(
        length=length,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # beyond, it is no floating point number
        bits_per_byte=loss_sum / math.log(2) / evaluation.num_bytes if evaluation.num_bytes else None,
        tokens=int(scored),
        tokens_per_second=scored / seconds,
        memory_bytes=int(all_reduce_raw(peak, groups.world, dist.ReduceOp.MAX)),
    )
    return result, sums_2S
