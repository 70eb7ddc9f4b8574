"""From the last hidden states to the loss of each token, without ever holding the logits of a long sequence at once.

Shapes: B batch, S sequence, H hidden, V vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megalibi.parallel import Layout, parallel_lm_logits, vocab_parallel_cross_entropy

LOSS_CHUNK_TOKENS = 2048
"""Tokens whose logits exist at once in evaluation; training keeps all for the backward pass."""


def token_losses(
    x_BSH: Tensor,
    weight_VH: Tensor,
    labels_BS: Tensor,
    *,
    layout: Layout,
    vocab_size: int,
    vocab_start: int,
) -> Tensor:
    """Return the cross entropy of each token in nats, fp32 [B, S]; 0 where the label is IGNORED_LABEL.

    Args:
        x_BSH: Last hidden states; cut along S under sequence parallelism.
        weight_VH: This rank's rows of the output table.
        labels_BS: The next tokens, whole on every rank.
        layout: How the ranks share the table and the hidden states.
        vocab_size: Ids from here on are padding and get no probability.
        vocab_start: Id of this rank's first row.
    """

    def losses_of(x_BSH: Tensor, labels_BS: Tensor) -> Tensor:
        logits_BSV = parallel_lm_logits(x_BSH, weight_VH, layout=layout)
        return vocab_parallel_cross_entropy(
            logits_BSV,
            labels_BS,
            group=layout.tensor,
            vocab_size=vocab_size,
            vocab_start=vocab_start,
            overwrite_logits=True,  # a linear layer does not keep its output
        )

    if torch.is_grad_enabled() or layout.sequence_parallel:
        return losses_of(x_BSH, labels_BS)
    return in_chunks(losses_of, x_BSH.flatten(0, 1), labels_BS.flatten()).view_as(labels_BS)


def in_chunks(losses_of: Callable[[Tensor, Tensor], Tensor], x_NH: Tensor, labels_N: Tensor) -> Tensor:
    """Return the losses of N tokens; in evaluation chunk by chunk, so that few logits exist at once."""
    if torch.is_grad_enabled():
        return losses_of(x_NH, labels_N)
    chunks = zip(x_NH.split(LOSS_CHUNK_TOKENS), labels_N.split(LOSS_CHUNK_TOKENS), strict=True)
    return torch.cat([losses_of(x, labels) for x, labels in chunks])
