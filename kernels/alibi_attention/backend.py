"""What a back end is and what it says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from alibi_attention.documents import PackedDocuments


@dataclass(frozen=True)
class Call:
    """What a back end has to know of a call to say whether it can do it."""

    device_type: str
    """``tensor.device.type``."""
    dtype: torch.dtype
    """Type of q, k and v."""
    head_dim: int
    """Head dimension of q, k and v."""
    dropout: bool = False
    """Whether attention weights are dropped."""
    documents: bool = False
    """Whether ``cu_seqlens`` is given."""
    gap: bool = False
    """Whether a query stands beyond the last key, so that no alignment of the ends gives its distances."""
    bias: str = "alibi"
    """What is added to the scores: "alibi" slopes, a "distance" bias, or "no" bias."""

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
    """Why it is not usable, or not on one of the devices that it knows; empty if it is."""
    exactness: str
    """In which precision bias, softmax and sums are formed."""
    devices: tuple[str, ...]
    """Device types it runs on."""
    dtypes: tuple[torch.dtype, ...]
    """Types of q, k and v it takes."""
    dropout: str
    """How it does attention dropout; empty if it cannot."""
    cu_seqlens: str
    """How it keeps documents apart."""
    horizon: bool = False
    """Whether it skips the keys past the horizon (horizon.py)."""
    gap: bool = True
    """Whether queries may stand beyond the last key."""
    distance_bias: bool = False
    """Whether it takes a bias that is a table over distances, and gives its gradient."""
    max_head_dim: int | None = None
    """Largest head dimension, None for any."""
    auto: bool = True
    """Whether "auto" may choose it; what runs in Triton's interpreter here is chosen by name alone, for tests."""

    def find_refusal(self, call: Call) -> str | None:
        """Return why this back end cannot do such a call, or None if it can."""
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
    """A back end is a module with a NAME and these two functions, and one line in dispatch.py."""

    NAME: str

    def capability(self) -> Capability:
        """Return what it can do here."""

    def attend(
        self,
        q_BSHK: torch.Tensor,
        k_BSHK: torch.Tensor,
        v_BSHK: torch.Tensor,
        *,
        alibi_slopes: torch.Tensor | None,
        distance_bias: torch.Tensor | None,
        softmax_scale: float,
        documents: PackedDocuments | None,
        dropout_p: float,
        query_offset: int,
        horizon_eps: float,
    ) -> torch.Tensor:
        """Attend causally; dispatch.py has checked the arguments and filled in the defaults."""
