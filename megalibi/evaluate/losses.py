"""The loss of a model on text: on validation batches during training, and in windows of any length afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import torch
from torch import Tensor, nn

from megalibi.data.loader import Batch
from megalibi.data.tokens.token_file import TokenFile
from megalibi.parallel import ALONE, IGNORED_LABEL, Group, ProcessGroups, all_reduce_raw

FORWARD_TOKENS = 8192
"""Most tokens of a forward pass over several windows; short windows one by one would leave the device idle."""


@torch.no_grad()
def validation_loss(
    model: nn.Module, batches: Iterable[Batch], *, groups: ProcessGroups, device: torch.device
) -> tuple[float, int]:
    """Return the mean loss in nats per token over the tokens of all data ranks, and their number.

    Every rank must call it.

    Args:
        model: A GPT, or a DeepSpeed engine around one.
        batches: This rank's share of the batches; all ranks must have the same number.
        groups: The process groups of this rank.
        device: The device that this rank computes on.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for host_batch in batches:
        batch = host_batch.to(device)
        losses_BS = model(batch.tokens, batch.labels, cu_seqlens=batch.cu_seqlens)
        total += torch.stack([losses_BS.double().sum(), (batch.labels != IGNORED_LABEL).sum().double()])
    loss_sum, tokens = all_reduce_raw(total, groups.data).tolist()
    return loss_sum / tokens, int(tokens)


@dataclass(frozen=True, kw_only=True)
class Window:
    """A stretch of a token stream that a model sees at once, and which of its predictions are scored.

    The model reads the tokens [start, stop) and predicts the tokens [start + 1, stop + 1).
    """

    start: int
    """Index of the first token that is read."""
    stop: int
    """Index after the last token that is read; the token at this index is predicted last."""
    scored_from: int
    """Index of the first predicted token that is scored."""


def windows(num_tokens: int, length: int, stride: int | None = None) -> Iterator[Window]:
    """Cut a stream into windows so that every token but the first is scored exactly once.

    Nonoverlapping windows (no stride) are blocks of ``length``, of which the last may be shorter; early tokens of a
    block have little context. Sliding windows after the first score only their last ``stride`` predictions, which have
    seen at least ``length - stride`` tokens (arXiv:2108.12409, appendix B). A stride of ``length`` gives nonoverlapping
    windows.

    Args:
        num_tokens: Number of tokens of the stream.
        length: Number of tokens that the model sees at once.
        stride: Number of tokens between the starts of two windows; None: ``length``.
    """
    stride = stride or length
    assert 1 <= stride <= length, (stride, length)
    last = num_tokens - 1  # the last token is only predicted
    stop = min(length, last)
    scored_from = 1
    while scored_from <= last:
        start = max(0, stop - length) if stride < length else scored_from - 1
        yield Window(start=start, stop=stop, scored_from=scored_from)
        scored_from, stop = stop + 1, min(stop + stride, last)


def batches_of_windows(num_tokens: int, length: int, stride: int | None = None) -> Iterator[list[Window]]:
    """Group the windows of a stream, in their order, into batches for one forward pass each.

    Args:
        num_tokens: Number of tokens of the stream.
        length: Number of tokens that the model sees at once.
        stride: Number of tokens between the starts of two windows; None: ``length``.
    """
    batch_size = max(1, FORWARD_TOKENS // length)
    for _, alike in groupby(windows(num_tokens, length, stride), lambda w: (w.stop - w.start, w.scored_from - w.start)):
        while batch := list(islice(alike, batch_size)):
            yield batch


@torch.no_grad()
def stream_loss(
    model: nn.Module,
    tokens: TokenFile,
    length: int,
    stride: int | None,
    num_tokens: int,
    *,
    device: torch.device,
    data: Group = ALONE,
) -> Iterator[Tensor]:
    """Yield the summed loss in nats and the number of scored tokens by position in the window, [2, length] in fp64.

    The prediction at position p has seen p + 1 tokens of its window. The data ranks take the forward passes in turns,
    and every rank gets the sums of all ranks; each rank must take everything that is yielded. Which windows are in one
    forward pass does not depend on the number of ranks, so that results differ only by the order of fp64 sums.

    Args:
        model: A GPT. All ranks of its tensor group must have the same rank in ``data``.
        tokens: The text.
        length: Number of tokens that the model sees at once.
        stride: Number of tokens between the starts of two windows; None: the windows do not overlap.
        num_tokens: Number of tokens of the text to use, from the first on.
        device: The device to compute on.
        data: The group of ranks that share the windows.
    """
    batches = batches_of_windows(num_tokens, length, stride)
    while turn := list(islice(batches, data.size)):
        sums_2S = torch.zeros(2, length, dtype=torch.float64, device=device)
        if data.rank < len(turn):
            _add_losses(sums_2S, model, tokens, turn[data.rank])
        yield all_reduce_raw(sums_2S, data).cpu()


def _add_losses(sums_2S: Tensor, model: nn.Module, tokens: TokenFile, batch: list[Window]) -> None:
    """Add the losses of windows of the same shape, and the number of these windows, by position."""
    rows = [tokens.read(window.start, window.stop - window.start + 1) for window in batch]
    stream_BS = torch.from_numpy(np.stack(rows).astype(np.int64)).to(sums_2S.device)
    labels_BS = stream_BS[:, 1:].clone()
    num_context = batch[0].scored_from - batch[0].start - 1  # predictions that an earlier window has scored
    labels_BS[:, :num_context] = IGNORED_LABEL
    losses_BS = model(stream_BS[:, :-1], labels_BS)
    scored = slice(num_context, labels_BS.shape[1])
    sums_2S[0, scored] += losses_BS[:, scored].double().sum(0)
    sums_2S[1, scored] += len(batch)
