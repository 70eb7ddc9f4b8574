"""What a back end is given, what it says of itself, and what it must offer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from alibi_attention.documents import PackedDocuments


# Both records that are made at every call are tuples: frozen dataclasses take three times as long to make and to hash,
# which a GPU that waits for a short sequence would notice.
class AttentionInputs(NamedTuple):
    """The arguments of one call of attention, checked and with their defaults filled in: see ``attention``."""

    q: torch.Tensor
    """Queries [batch, queries, heads, head dimension]."""
    k: torch.Tensor
    """Keys [batch, keys, heads, head dimension]."""
    v: torch.Tensor
    """Values, of the keys' shape."""
    alibi_slopes: torch.Tensor | None
    """Slope of each head [heads], fp32, or None for no slopes."""
    distance_bias: torch.Tensor | None
    """Learned bias of each head at each distance [heads, distances], or None; never given together with slopes."""
    softmax_scale: float
    """Factor of q k^T, above 0."""
    documents: PackedDocuments | None
    """Documents that attention keeps apart, or None where every row of the batch is one document."""
    dropout_p: float
    """Probability with which an attention weight is dropped."""
    query_offset: int
    """Position of the first query, where the first key has position 0."""
    horizon_eps: float
    """Largest share of a query's attention weights that may be left out."""

    @property
    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values."""
        return self[:3]


class Call(NamedTuple):
    """What a back end must know of a call to say whether it can run it."""

    device_type: str
    """``tensor.device.type`` of q, k and v."""
    dtype: torch.dtype
    """Type of q, k and v."""
    head_dim: int
    """Head dimension of q, k and v."""
    dropout: bool = False
    """Whether attention weights are dropped."""
    documents: bool = False
    """Whether rows are packed documents, so that ``cu_seqlens`` is given."""
    gap: bool = False
    """Whether a query stands beyond the last key, so that aligning the ends does not give its distances."""
    bias: str = "alibi"
    """What is added to the scores: "alibi" for slopes, "distance" for a learned bias, or "no"."""

    def __str__(self) -> str:
        said = f"{self.device_type}, {self.dtype}, head_dim {self.head_dim}"
        said += "".join(f", {name}" for name in ("dropout", "documents", "gap") if getattr(self, name))
        return said if self.bias == "alibi" else f"{said}, {self.bias} bias"


@dataclass(frozen=True)
class Capability:
    """What one back end can do in this installation."""

    name: str
    """The name that selects it."""
    usable: bool
    """Whether what it needs is installed."""
    reason: str
    """Why it is not usable, or not usable on one of its devices; empty otherwise."""
    exactness: str
    """The precision in which bias, softmax and sums are formed, and how memory grows."""
    devices: tuple[str, ...]
    """Device types it runs on."""
    dtypes: tuple[torch.dtype, ...]
    """Types of q, k and v it takes."""
    dropout: bool
    """Whether it can drop attention weights."""
    cu_seqlens: str
    """How it keeps packed documents apart."""
    horizon: bool = False
    """Whether it skips the keys past the horizon (horizon.py)."""
    gap: bool = True
    """Whether queries may stand beyond the last key."""
    distance_bias: bool = False
    """Whether it takes a table of biases by distance, and returns its gradient."""
    max_head_dim: int | None = None
    """Largest head dimension it takes, or None for any."""
    auto: bool = True
    """Whether "auto" may choose it. What Triton's interpreter runs here is for tests, and is chosen by name only."""

    def find_refusal(self, call: Call) -> str | None:
        """Return why this back end cannot run such a call, or None if it can."""
        if not self.usable:
            return self.reason
        if call.device_type not in self.devices:
            because = f": {self.reason}" if self.reason else ""
            return f"device {call.device_type} is not one of {', '.join(self.devices)}{because}"
        if call.dtype not in self.dtypes:
            return f"dtype {call.dtype} is not one of {', '.join(map(str, self.dtypes))}"
        if self.max_head_dim is not None and call.head_dim > self.max_head_dim:
            return f"head_dim {call.head_dim} is more than {self.max_head_dim}"
        if call.dropout and not self.dropout:
            return "it has no attention dropout"
        if call.gap and not self.gap:
            return "it cannot place queries beyond the last key"
        if call.bias == "distance" and not self.distance_bias:
            return "it takes slopes alone, no distance bias"
        return None


class Backend(Protocol):
    """A back end is a module with a NAME and these two functions, and is listed once, in attention.py."""

    NAME: str
    """The name that selects the back end."""

    def capability(self) -> Capability:
        """Return what it can do here."""

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """Return causal attention [batch, queries, heads, head dimension] in the type of q."""
