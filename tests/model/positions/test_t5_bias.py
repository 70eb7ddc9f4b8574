from __future__ import annotations

import math

import pytest
import torch

from megalibi.model.positions.t5_bias import T5Bias, distance_buckets
from megalibi.parallel import ALONE, get_shard_spec, unshard
from tests.support.models import make_model
from tests.support.tensors import fake_group

CPU = torch.device("cpu")


def test_buckets_equal_the_definition() -> None:
    buckets = distance_buckets(1000, 32, 128).tolist()
    assert buckets[:16] == list(range(16))
    for distance in range(16, 1000):
        expected = 16 + math.floor(math.log(distance / 16) / math.log(128 / 16) * 16)
        assert buckets[distance] == min(31, expected)
    assert buckets[127] == 31  # 16 + floor(15.94)
    assert set(buckets[113:]) == {31}
    assert set(buckets) == set(range(32))


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_every_distance_has_the_number_of_its_bucket_and_head(scale: float) -> None:
    positions = T5Bias(make_model(num_attention_heads=4, t5_bias_scale=scale), ALONE)
    table = torch.randn(4, 32)
    positions.table.weight.data.copy_(table)
    bias = positions.score_bias(300, CPU).distance_bias
    assert bias is not None
    assert bias.shape == (4, 300)
    for distance, bucket in enumerate(distance_buckets(300, 32, 128).tolist()):
        assert torch.equal(bias[:, distance], scale * table[:, bucket])


def test_ranks_hold_the_rows_of_their_heads() -> None:
    model = make_model(num_attention_heads=12)
    parts = [T5Bias(model, fake_group(rank, 4)).table.weight for rank in range(4)]
    for rank, part in enumerate(parts):
        part.data.copy_(torch.arange(3 * rank, 3 * rank + 3)[:, None].expand(3, 32))
    spec = get_shard_spec(parts[0])
    assert spec is not None
    assert unshard(parts, spec)[:, 0].tolist() == list(range(12))


def test_the_bias_is_fp32_whatever_holds_the_table() -> None:
    positions = T5Bias(make_model(), ALONE)
    torch.nn.init.normal_(positions.table.weight)
    positions.bfloat16()
    bias = positions.score_bias(8, CPU).distance_bias
    assert bias is not None
    assert bias.dtype == torch.float32
