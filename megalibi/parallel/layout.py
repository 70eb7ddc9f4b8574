"""How the ranks of a model copy share its activations, in one record that layers hand on to their parts."""

from __future__ import annotations

from dataclasses import dataclass

from megalibi.parallel.groups import ALONE, Group


@dataclass(frozen=True)
class Layout:
    """Where a layer's slices are, and how the activations between the layers are cut."""

    tensor: Group = ALONE
    """The ranks that hold the slices of each layer."""
    sequence_parallel: bool = False
    """Whether the activations between the layers are cut along the sequence, a slice for each of these ranks
    (arXiv:2205.05198); otherwise every rank holds all of them. It is always False for a group of one."""

    def __post_init__(self) -> None:
        if self.tensor.size == 1:  # there is nothing to cut, and nobody needs to ask for the size again
            object.__setattr__(self, "sequence_parallel", False)


WHOLE = Layout()
"""Nothing is cut: one rank holds all layers and all activations."""
