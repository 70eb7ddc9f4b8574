"""What a back end is and what it says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Capability:
    """What one back end can do in this installation."""

    name: str
    """The name that selects it."""
    usable: bool
    """Whether what it needs is installed."""
    reason: str
    """Why it is not usable; empty if it is."""
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
    max_head_dim: int | None = None
    """Largest head dimension, None for any."""

    def find_refusal(self, device_type: str, dtype: torch.dtype, head_dim: int, dropout: bool) -> str | None:
        """Return why this back end cannot do such a call, or None if it can."""
        if not self.usable:
            return self.reason
        if device_type not in self.devices:
            return f"device {device_type} is not one of {', '.join(self.devices)}"
        if dtype not in self.dtypes:
            return f"dtype {dtype} is not one of {', '.join(map(str, self.dtypes))}"
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return f"head_dim {head_dim} is more than {self.max_head_dim}"
        if dropout and not self.dropout:
            return "it has no attention dropout"
        return None


class Backend(Protocol):
    """A back end is a module with these two functions, and one line in dispatch.py."""

    def capability(self) -> Capability:
        """Return what it can do here."""

    def attend(
        self,
        q_BSHK: torch.Tensor,
        k_BSHK: torch.Tensor,
        v_BSHK: torch.Tensor,
        *,
        alibi_slopes: torch.Tensor | None,
        softmax_scale: float,
        cu_seqlens: torch.Tensor | None,
        dropout_p: float,
        query_offset: int,
    ) -> torch.Tensor:
        """Attend causally; dispatch.py has checked the arguments and filled in the defaults."""
