"""The shape of a call as the Triton kernels see it: rows of one length, or packed documents.

A row is a sequence of the batch or a packed document. Its queries and its keys are cut into blocks, and programs are
counted in blocks (common.py). This module needs no Triton.

Shape suffixes: B batch, S sequence, H heads, K head dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from alibi_attention.documents import PackedDocuments

_MIN_HEAD_DIM = 16  # of a matrix product


class Documents(NamedTuple):
    """The tensors that describe documents packed into a row; both are None for rows of one length."""

    cu_seqlens: torch.Tensor | None
    """Boundaries of the documents [N + 1]."""
    tasks: torch.Tensor | None
    """Row, number within the row, and first block of the row, for every block: see ``PackedDocuments.blocks``."""


NO_DOCUMENTS = Documents(None, None)


class Geometry(NamedTuple):
    """The shape of a call: only numbers, so that it can key what is kept for a shape."""

    packed: bool
    """Whether the rows are packed documents."""
    num_groups: int
    """Number of heads of all rows; that of one row if documents are packed, which share the numbering of blocks."""
    num_heads: int
    """Number of heads of a row."""
    num_query_blocks: int
    """Number of blocks of queries in a row, or in all documents if they are packed."""
    num_key_blocks: int
    """Number of blocks of keys in a row, or in all documents if they are packed."""
    num_queries: int
    """Number of queries of a row, or of all documents if they are packed."""
    num_keys: int
    """Number of keys of a row, or of all documents if they are packed."""
    query_offset: int
    """Position of a row's first query."""
    head_dim: int
    """Head dimension of q, k and v."""
    block: int
    """Number of tokens of a block."""

    def arguments(self) -> dict[str, Any]:
        """Return what every kernel is called with."""
        return {
            "num_groups": self.num_groups,
            "num_heads": self.num_heads,
            "num_query_blocks": self.num_query_blocks,
            "num_key_blocks": self.num_key_blocks,
            "num_queries": self.num_queries,
            "num_keys": self.num_keys,
            "query_offset": self.query_offset,
            "HEAD_DIM": self.head_dim,
            "BLOCK_K": max(_MIN_HEAD_DIM, 1 << (self.head_dim - 1).bit_length()),
            "BLOCK": self.block,
        }

    def strides(self, **strides: tuple[int, ...]) -> dict[str, int]:
        """Return strides of [B, S, H, K] tensors as arguments, by the kernels' names of the tensors."""
        arguments: dict[str, int] = {}
        for name, (stride_b, stride_s, stride_h, _) in strides.items():
            # A packed document is found by its first token alone.
            arguments[f"{name}_stride_b"] = 0 if self.packed else stride_b
            arguments[f"{name}_stride_s"] = stride_s
            arguments[f"{name}_stride_h"] = stride_h
        return arguments

    def dense_strides(self, num_tokens: int) -> tuple[int, ...]:
        """Return the strides of a [B, S, H, K] tensor of so many tokens in a row that is contiguous."""
        stride_s = self.num_heads * self.head_dim
        return num_tokens * stride_s, stride_s, self.head_dim, 1


def make_geometry(
    q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, packed: PackedDocuments | None, query_offset: int, block: int
) -> tuple[Geometry, Documents]:
    """Return the geometry of a call; packed documents have to be one row of a batch."""
    batch, num_queries, num_heads, head_dim = q_BSHK.shape
    num_keys = k_BSHK.shape[1]
    documents = NO_DOCUMENTS
    num_query_blocks, num_key_blocks = -(-num_queries // block), -(-num_keys // block)
    if packed is not None:
        tasks = packed.blocks(block)
        documents = Documents(packed.cu_seqlens, tasks)
        num_query_blocks = num_key_blocks = tasks.shape[1]
    geometry = Geometry(
        packed=packed is not None,
        num_groups=batch * num_heads,
        num_heads=num_heads,
        num_query_blocks=num_query_blocks,
        num_key_blocks=num_key_blocks,
        num_queries=num_queries,
        num_keys=num_keys,
        query_offset=query_offset,
        head_dim=head_dim,
        block=block,
    )
    return geometry, documents
