"""Documents packed into one batch: boundaries, and the loop for back ends that know no documents themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise

import torch


def get_lengths(cu_seqlens: torch.Tensor, num_tokens: int) -> list[int]:
    """Return the documents' lengths in tokens; some may be 0.

    Args:
        cu_seqlens: Boundaries [N + 1] over the flattened tokens of the batch.
        num_tokens: Tokens in the batch, B * S.

    Raises:
        ValueError: The boundaries do not rise from 0 to ``num_tokens``.
    """
    boundaries = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(boundaries)]
    if boundaries[0] != 0 or boundaries[-1] != num_tokens or min(lengths) < 0:
        raise ValueError(f"cu_seqlens: must rise from 0 to the batch's {num_tokens} tokens, got {_shorten(boundaries)}")
    return lengths


def attend_per_document(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    q_BSHK: torch.Tensor,
    k_BSHK: torch.Tensor,
    v_BSHK: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """Call ``attend`` for every document, once for all documents of one length, and put the results back in order."""
    batch, seq_length = q_BSHK.shape[:2]
    lengths = get_lengths(cu_seqlens, batch * seq_length)
    # Tensor.split, not slices: its backward is one concatenation, not one zero-filled batch for each document.
    documents_q, documents_k, documents_v = (x.flatten(0, 1).split(lengths) for x in (q_BSHK, k_BSHK, v_BSHK))
    same_length: defaultdict[int, list[int]] = defaultdict(list)
    for document, length in enumerate(lengths):
        same_length[length].append(document)

    outputs = list(documents_q)  # an empty document is its own output
    for length, group in same_length.items():
        if length > 0:
            grouped = (
                torch.stack([x[document] for document in group]) for x in (documents_q, documents_k, documents_v)
            )
            for document, output_SHK in zip(group, attend(*grouped).unbind(), strict=True):
                outputs[document] = output_SHK
    return torch.cat(outputs).unflatten(0, (batch, seq_length))


def _shorten(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
