"""Where the model drops, and dropout on the residual stream.

Masks are keyed (megalibi/parallel/random.py): by the micro batch, the layer, the site and, where each rank of the
tensor group drops on numbers of its own, the rank.
"""

from __future__ import annotations

from torch import Tensor

from megalibi.parallel import Layout, dropout_key, keyed_dropout

OUTSIDE_BLOCKS = -1
"""The layer of a site that stands in no block."""


class Site:
    """The name of each place where the model drops.

    A name is part of what a seed means, since the masks are drawn from a hash of it: another name, other masks.
    """

    EMBEDDING = "embedding"
    ATTENTION_WEIGHTS = "attention"
    ATTENTION_OUTPUT = "attention output"
    ACTIVATION = "activation"
    MLP_OUTPUT = "mlp output"
    ADAPTIVE_SOFTMAX = "adaptive softmax"

    @staticmethod
    def of_band(number: int) -> str:
        """Return the site in a later band of the adaptive softmax; the first later band is number 1."""
        return f"{Site.ADAPTIVE_SOFTMAX}, band {number}"


class ResidualDropout:
    """Dropout outside the tensor-parallel regions, where all ranks of the tensor group hold the same numbers.

    They all drop by one mask. Under sequence parallelism each rank holds other tokens, and drops by a mask of its own.

    Args:
        p: Probability of dropping.
        layer: Index of the block, or OUTSIDE_BLOCKS.
        layout: How the ranks share the activations.
    """

    def __init__(self, p: float, layer: int, *, layout: Layout) -> None:
        self.p = p
        self.layer = layer
        self.shard_rank = layout.tensor.rank if layout.sequence_parallel else None

    def __call__(self, x_BSH: Tensor, site: str, micro_batch_key: int | None) -> Tensor:
        """Return x with elements dropped; x itself if there is no key."""
        if self.p == 0.0 or micro_batch_key is None:
            return x_BSH
        key = dropout_key(micro_batch_key, layer=self.layer, site=site, shard_rank=self.shard_rank)
        return keyed_dropout(x_BSH, self.p, key)
