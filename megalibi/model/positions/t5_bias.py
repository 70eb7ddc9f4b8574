"""T5's learned bias (arXiv:1910.10683, section 2.1): one number for each head and bucket of distances."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megalibi.config import ModelConfig
from megalibi.model.init import Normal, set_init
from megalibi.model.positions.base import PositionMethod, ScoreBias
from megalibi.parallel import Group, ShardSpec, set_shard_spec


class T5Bias(PositionMethod):
    """A bias that all layers share; each rank holds the rows of its heads."""

    bias = "distance"

    def __init__(self, model: ModelConfig, group: Group) -> None:
        super().__init__(model, group)
        self.table = BucketTable(model, group)

    def score_bias(self, seq_length: int, device: torch.device) -> ScoreBias:
        """Return the bias of every distance below the length, fp32 [A, S]."""
        return ScoreBias(distance_bias=self.table(seq_length))


class BucketTable(nn.Module):
    """The learned numbers, [A, buckets]. Weight decay spares them: it would pull far and near keys together."""

    def __init__(self, model: ModelConfig, group: Group) -> None:
        super().__init__()
        self.num_buckets, self.max_distance = model.t5_num_buckets, model.t5_max_distance
        self.scale = model.t5_bias_scale
        spec = ShardSpec(dim=0, full_size=model.num_attention_heads)
        self.weight = nn.Parameter(torch.empty(spec.local_size(group.size), self.num_buckets))
        set_shard_spec(self.weight, spec)
        set_init(self.weight, Normal(model.init_std), may_decay=False)

    def forward(self, num_distances: int) -> Tensor:
        """Return the bias of the distances 0, 1, 2, ..., fp32 [A, D]."""
        buckets_D = distance_buckets(num_distances, self.num_buckets, self.max_distance)
        return self.scale * self.weight.float()[:, buckets_D.to(self.weight.device)]


def distance_buckets(num_distances: int, num_buckets: int, max_distance: int) -> Tensor:
    """Return the bucket of each distance, int64 [D], for attention to the past.

    The first half of the buckets hold one distance each; the others grow geometrically up to ``max_distance``, and the
    last one holds everything beyond.

    Args:
        num_distances: How many distances, from 0 on.
        num_buckets: How many buckets.
        max_distance: From here on all distances share the last bucket.
    """
    exact = num_buckets // 2
    distance_D = torch.arange(num_distances)
    growth = (num_buckets - exact) / math.log(max_distance / exact)
    geometric_D = exact + (growth * (distance_D.clamp(min=exact).double() / exact).log()).long()
    return torch.where(distance_D < exact, distance_D, geometric_D.clamp(max=num_buckets - 1))
