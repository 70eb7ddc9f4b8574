"""The evaluation of one checkpoint on one text: the checks before it, and the numbers at each length.

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

from megalibi.config import Config
from megalibi.data.provenance import check_tokenizer
from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.words import WordTokenizer
from megalibi.data.tokens.token_file import TokenFile, check_ids
from megalibi.errors import CheckpointError, ConfigError, DataError
from megalibi.evaluate.losses import stream_loss
from megalibi.evaluate.result import EvaluationResult
from megalibi.evaluate.slope_scale import SlopeScale
from megalibi.metrics.memory import memory_peak_bytes
from megalibi.model import GPT
from megalibi.parallel import ProcessGroups, all_reduce_raw

_CHECK_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class EvaluationSetup:
    """What stays the same from the first evaluation length to the last."""

    model: GPT
    """The model of the checkpoint, with this rank's slices of its parameters."""
    text: TokenFile
    """The text that is scored."""
    num_tokens: int
    """Number of tokens of the text that are used, from the first on."""
    num_bytes: int | None
    """Number of bytes of the text that the scored tokens stand for; None: it is not known."""
    stride: int | None
    """Tokens between the starts of two windows; None: the windows do not overlap."""
    groups: ProcessGroups
    """Process groups of this rank; the data ranks share the windows."""
    device: torch.device
    """Device that this rank computes on."""
    train_seq_length: int
    """Tokens that the model saw at once in training."""
    slope_scale: SlopeScale | None = None
    """What the slopes of ALiBi are multiplied by; None: they are those of the training."""


def check_lengths(config: Config, lengths: list[int], option: str = "--lengths") -> None:
    """Check before the work that the model can see so many tokens at once.

    Args:
        config: The configuration of the checkpoint.
        lengths: The numbers of tokens.
        option: The option that names them.

    Raises:
        ConfigError: A length is past the last position that the model has learned.
    """
    cap = config.model.max_position_embeddings
    if cap and max(lengths) > cap:
        raise ConfigError(
            f"{option}={max(lengths)}: must be at most model.max_position_embeddings={cap} of the checkpoint, whose "
            f"model.position_method={config.model.position_method} has learned no positions beyond"
        )


def check_tensor_parallel_size(config: Config, size: int, world_size: int) -> None:
    """Check before the work that so many ranks can share the model.

    Args:
        config: The configuration of the checkpoint.
        size: The number of ranks that share one model.
        world_size: The number of all ranks.

    Raises:
        ConfigError: The size does not divide the ranks, the heads or the feed-forward width.
    """
    if size < 1:
        raise ConfigError(f"--tensor-parallel-size={size}: must be at least 1")
    shared = {
        "the number of ranks": world_size,
        "model.num_attention_heads": config.model.num_attention_heads,
        "model.ffn_hidden_size": config.model.ffn_hidden_size,
    }
    for name, value in shared.items():
        if value % size:
            raise ConfigError(f"--tensor-parallel-size={size}: must divide {name}={value}")


def check_same_tokenizer(
    trained: Mapping[str, Any],
    text: TokenFile | None,
    tokenizer: Tokenizer | WordTokenizer | None,
    option: str = "--tokenizer",
) -> None:
    """Check before the work that the text and the model were tokenized alike: the ids alone would not show it.

    Args:
        trained: The field ``data`` of the checkpoint's manifest.
        text: The token file to score; None if the text is no token file.
        tokenizer: The tokenizer of the text; None if it is not known.
        option: The option that names the tokenizer.

    Raises:
        DataError: The text and the model have different tokenizers.
    """
    sha256 = check_tokenizer([] if text is None else [text], tokenizer, option)
    if sha256 is not None and trained.get("tokenizer_sha256") not in (None, sha256):
        what = f"{option}={tokenizer.path}" if tokenizer is not None else f"the tokenizer of {text and text.prefix}"
        raise DataError(
            f"{what} (sha256 {sha256[:12]}) is not the tokenizer that the checkpoint was trained with (sha256 "
            f"{trained['tokenizer_sha256'][:12]}): tokenize the text with that one"
        )


def check_and_measure(text: TokenFile, num_tokens: int, vocab_size: int, tokenizer: Tokenizer | None) -> int | None:
    """Check every token that will be used, and return the number of bytes of text that the scored tokens stand for.

    Args:
        text: The text to score.
        num_tokens: Number of its tokens to use, from the first on.
        vocab_size: Number of ids that the model knows.
        tokenizer: The tokenizer of the text; None if its bytes cannot be counted.

    Returns:
        The number of bytes; None without a tokenizer.

    Raises:
        UserError: A token is past the vocabulary of the model or of the tokenizer.
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
    setup: EvaluationSetup, length: int, show: Callable[[int, float], None]
) -> tuple[EvaluationResult, NDArray[np.float64]]:
    """Score the text at one length. Every rank gets the numbers of all ranks.

    Args:
        setup: The model, the text and the ranks.
        length: Number of tokens that the model sees at once.
        show: Called after each forward pass with the number of tokens scored so far and their mean loss.

    Returns:
        The result, and the summed loss and number of scored tokens by position in the window, [2, S].

    Raises:
        CheckpointError: The loss is not finite.
    """
    device, groups = setup.device, setup.groups
    factor = None if setup.slope_scale is None else setup.slope_scale.at(length, setup.train_seq_length)
    if factor is not None:
        setup.model.scale_slopes(factor)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    sums_2S, start = np.zeros((2, length)), time.perf_counter()
    for turn_2S in stream_loss(
        setup.model,
        setup.text,
        length,
        setup.stride,
        setup.num_tokens,
        device=device,
        data=groups.data,
    ):
        sums_2S += turn_2S.numpy()
        loss_sum, scored = sums_2S.sum(1).tolist()
        show(int(scored), loss_sum / scored)
    loss = loss_sum / scored
    if not math.isfinite(loss):
        raise CheckpointError(f"the loss at length {length} is {loss}: give a checkpoint from before the run diverged")
    seconds = time.perf_counter() - start
    peak = torch.tensor(memory_peak_bytes(device), device=device)
    result = EvaluationResult(
        length=length,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # beyond 700 it would overflow
        bits_per_byte=loss_sum / math.log(2) / setup.num_bytes if setup.num_bytes else None,
        tokens=int(scored),
        tokens_per_second=scored / seconds,
        memory_bytes=int(all_reduce_raw(peak, groups.world, dist.ReduceOp.MAX)),
        slope_scale=factor,
    )
    return result, sums_2S
