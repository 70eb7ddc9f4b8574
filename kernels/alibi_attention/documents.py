"""Documents packed into one batch: their boundaries, and a loop for back ends that have no documents of their own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise

import torch


class PackedDocuments:
    """The documents of a batch: their boundaries, read once, and what the back ends derive from them, derived once.

    A model makes one for all of its layers. If the boundaries are on the host, no layer waits for the device. Neither
    the object nor the boundaries that it was made of may be changed.

    Args:
        cu_seqlens: Boundaries [N + 1], int32, over the flattened tokens of the batch; documents may be empty. They are
            best on the host: boundaries on a device are read back, which waits for it.
        num_tokens: Number of tokens of the batch, B * S.
        device: Device of q, k and v, or None for that of ``cu_seqlens``.

    Attributes:
        cu_seqlens: The boundaries, on the device of q, k and v.
        lengths: Number of tokens of each document.
        max_length: Number of tokens of the longest document.
        num_tokens: Number of tokens of all documents.

    Raises:
        ValueError: The boundaries have another type, or do not rise from 0 to ``num_tokens``.
    """

    def __init__(self, cu_seqlens: torch.Tensor, num_tokens: int, device: torch.device | None = None) -> None:
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            given = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
            raise ValueError(f"cu_seqlens: must be torch.int32 [documents + 1], got {given}")
        boundaries = cu_seqlens.tolist()
        self.lengths = tuple(end - start for start, end in pairwise(boundaries))
        if boundaries[0] != 0 or boundaries[-1] != num_tokens or min(self.lengths) < 0:
            rise = f"must rise from 0 to the batch's {num_tokens} tokens"
            raise ValueError(f"cu_seqlens: {rise}, got {_shorten(boundaries)}")
        self.max_length = max(self.lengths)
        self.num_tokens = num_tokens
        self.cu_seqlens = _copy_to(cu_seqlens.contiguous(), device or cu_seqlens.device)
        self._blocks: dict[int, torch.Tensor] = {}

    def blocks(self, block: int) -> torch.Tensor:
        """Return the blocks that the documents are cut into, the same tensor at each call.

        Args:
            block: Number of tokens of a block.

        Returns:
            For every block its document, its number within the document, and the document's first block among all
            blocks: int32 [3, blocks] on the device. Blocks with the most causal work come first.
        """
        if block not in self._blocks:
            lengths = torch.tensor(self.lengths)
            num_blocks = (lengths + block - 1) // block
            documents = torch.arange(len(lengths)).repeat_interleave(num_blocks)
            first_blocks = (num_blocks.cumsum(0) - num_blocks)[documents]
            numbers = torch.arange(len(documents)) - first_blocks
            order = numbers.argsort(descending=True, stable=True)
            blocks = torch.stack([documents, numbers, first_blocks])[:, order].to(torch.int32)
            self._blocks[block] = _copy_to(blocks, self.cu_seqlens.device)
        return self._blocks[block]


def attend_per_document(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    q_BSHK: torch.Tensor,
    k_BSHK: torch.Tensor,
    v_BSHK: torch.Tensor,
    documents: PackedDocuments | None,
) -> torch.Tensor:
    """Call ``attend`` once for all documents of one length, and put the results back in order.

    Without documents the rows of the batch are what it is called for.
    """
    if documents is None:
        return attend(q_BSHK, k_BSHK, v_BSHK)
    batch, seq_length = q_BSHK.shape[:2]
    # Tensor.split, not slices: its backward pass is one concatenation, not one zero-filled batch per document.
    documents_q, documents_k, documents_v = (x.flatten(0, 1).split(documents.lengths) for x in (q_BSHK, k_BSHK, v_BSHK))
    same_length: defaultdict[int, list[int]] = defaultdict(list)
    for document, length in enumerate(documents.lengths):
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


def _copy_to(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)  # from other memory the host waits for the copy


def _shorten(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
