"""The loss of a model on text: over validation batches in training, and over windows of any length after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import torch
from torch import nn

from megalibi.data.loader import IGNORE_INDEX, Batch
from megalibi.data.token_file import TokenFile
from megalibi.parallel import ProcessGroups, all_reduce_raw

FORWARD_TOKENS = 8192
"""Windows that are alike are evaluated together up to this many tokens: short ones alone would leave a device idle."""


@torch.no_grad()
def validation_loss(
    model: nn.Module, batches: Iterable[Batch], *, groups: ProcessGroups, device: torch.device
) -> tuple[float, int]:
    """Return the mean loss in nats over the tokens of all data ranks, and their number; every rank must call it.

    Args:
        model: A GPT, or a DeepSpeed engine around one.
        batches: This rank's share; every rank must have as many.
        groups: Of this process.
        device: Where this rank computes.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        labels_BS = batch.labels.to(device)
        cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.to(device)
        losses_BS = model(batch.tokens.to(device), labels_BS, cu_seqlens=cu_seqlens)
        total += torch.stack([losses_BS.double().sum(), (labels_BS != IGNORE_INDEX).sum().double()])
    loss_sum, tokens = all_reduce_raw(total, groups.data).tolist()
    return loss_sum / tokens, int(tokens)


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens a model sees at once, and which of its predictions count.

    The model reads the tokens [start, stop) and predicts [start + 1, stop + 1); the predictions from ``scored_from`` on
    count, as places in the stream.
    """

    start: int
    stop: int
    scored_from: int


def windows(num_tokens: int, length: int, stride: int | None = None) -> Iterator[Window]:
    """Cut a stream into windows so that every token but the first is scored exactly once.

    Nonoverlapping (no stride): blocks of ``length``, the last one shorter; early tokens of a block have little context.
    Sliding: after the first window each scores only its last ``stride`` predictions, which have seen at least
    ``length - stride`` tokens (arXiv:2108.12409, appendix B). A stride of ``length`` is nonoverlapping evaluation.

    Args:
        num_tokens: Tokens of the stream.
        length: Tokens the model sees at once.
        stride: Tokens between windows; None: ``length``.
    """
    stride = stride or length
    last = num_tokens - 1  # the last token is only predicted
    stop = min(length, last)
    scored_from = 1
    while scored_from <= last:
        start = max(0, stop - length) if stride < length else scored_from - 1
        yield Window(start=start, stop=stop, scored_from=scored_from)
        scored_from, stop = stop + 1, min(stop + stride, last)


def batches_of_windows(num_tokens: int, length: int, stride: int | None = None) -> Iterator[list[Window]]:
    """Group the windows of a stream, in their order, into those that one forward pass can take: at least one.

    Args:
        num_tokens: Tokens of the stream.
        length: Tokens the model sees at once.
        stride: As for ``windows``.
    """
    batch_size = max(1, FORWARD_TOKENS // length)
    for _, alike in groupby(windows(num_tokens, length, stride), lambda w: (w.stop - w.start, w.scored_from - w.start)):
        while batch := list(islice(alike, batch_size)):
            yield batch


@torch.no_grad()
def stream_loss(
    model: nn.Module, tokens: TokenFile, length: int, stride: int | None, num_tokens: int, *, device: torch.device
) -> Iterator[tuple[float, int]]:
    """Yield the summed loss in nats and the number of scored tokens of each forward pass.

    Args:
        model: A GPT whose tensor group is this process alone.
        tokens: The text.
        length: Tokens the model sees at once.
        stride: None for nonoverlapping windows.
        num_tokens: How much of the text to use.
        device: Where to compute.
    """
    for batch in batches_of_windows(num_tokens, length, stride):
        rows = [tokens.read(window.start, window.stop - window.start + 1) for window in batch]
        stream_BS = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)
        labels_BS = stream_BS[:, 1:].clone()
        num_context = batch[0].scored_from - batch[0].start - 1  # predictions that an earlier window has scored
        labels_BS[:, :num_context] = IGNORE_INDEX
        losses_BS = model(stream_BS[:, :-1], labels_BS)
        yield losses_BS.double().sum().item(), labels_BS[:, num_context:].numel()
