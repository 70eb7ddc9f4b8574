"""ALiBi attention, exact and fast: one function over several back ends."""

from __future__ import annotations

from alibi_attention.attention import attention, backends, resolve_backend
from alibi_attention.documents import PackedDocuments
from alibi_attention.packed import split_qkv
from alibi_attention.slopes import alibi_slopes, local_slopes

__all__ = [
    "PackedDocuments",
    "alibi_slopes",
    "attention",
    "backends",
    "local_slopes",
    "resolve_backend",
    "split_qkv",
]
