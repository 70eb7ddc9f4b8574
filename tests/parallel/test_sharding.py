from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import nn

from megalibi.parallel.sharding import ShardSpec, get_shard_spec, set_shard_spec, shard, unshard


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 3), ShardSpec(dim=0, full_size=8)),
        ((3, 8), ShardSpec(dim=1, full_size=8)),
        ((12,), ShardSpec(dim=0, full_size=12)),
        ((36, 5), ShardSpec(dim=0, full_size=36, parts=3)),
        ((5, 24, 2), ShardSpec(dim=1, full_size=24, parts=2)),
        ((13, 3), ShardSpec(dim=0, full_size=13, padding=3)),
        ((3, 5), ShardSpec(dim=1, full_size=5, padding=11)),  # ranks 2 and 3 of 4 hold nothing but padding
    ],
)
def test_unshard_is_the_inverse_of_shard(shape: tuple[int, ...], spec: ShardSpec, size: int) -> None:
    full = torch.arange(1.0, 1.0 + torch.Size(shape).numel()).reshape(shape)
    shards = [shard(full, spec, rank, size) for rank in range(size)]
    assert {local.shape[spec.dim] for local in shards} == {spec.local_size(size)}
    assert sum((local == 0).sum().item() for local in shards) == spec.padding * full.numel() // spec.full_size
    assert torch.equal(unshard(shards, spec), full)


def test_every_part_is_cut_on_its_own() -> None:
    spec = ShardSpec(dim=0, full_size=12, parts=3)  # q0..q3 k0..k3 v0..v3
    assert shard(torch.arange(12), spec, rank=1, size=2).tolist() == [2, 3, 6, 7, 10, 11]
    assert spec.local_ranges(1, 2) == [range(2, 4), range(6, 8), range(10, 12)]


def test_a_shard_is_a_copy() -> None:
    full = torch.ones(4)
    shard(full, ShardSpec(dim=0, full_size=4), 0, 1).zero_()
    assert full.sum() == 4


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="3 x 4 slices do not divide 18"):
        ShardSpec(dim=0, full_size=18, parts=3).local_size(4)
    with pytest.raises(ValueError, match=r"full_size=4.*got a tensor of shape \(5,\)"):
        shard(torch.zeros(5), ShardSpec(dim=0, full_size=4), 0, 2)
    with pytest.raises(ValueError, match=r"expected 2 of 2 ranks, got shape \(3,\)"):
        unshard([torch.zeros(2), torch.zeros(3)], ShardSpec(dim=0, full_size=4))


@pytest.mark.parametrize("wrong", [{"dim": -1}, {"full_size": 0}, {"parts": 0}, {"padding": -1}])
def test_a_spec_without_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="dim and padding must be 0 or more"):
        ShardSpec(**{"dim": 0, "full_size": 4, **wrong})
    with pytest.raises(ValueError, match="cannot be padded"):
        ShardSpec(dim=0, full_size=4, parts=2, padding=4)


def test_deepspeed_sees_a_sharded_parameter() -> None:
    param = nn.Parameter(torch.zeros(4))
    assert get_shard_spec(param) is None
    assert not is_model_parallel_parameter(param)
    set_shard_spec(param, ShardSpec(dim=0, full_size=8))
    assert get_shard_spec(param) == ShardSpec(dim=0, full_size=8)
    assert is_model_parallel_parameter(param)
    assert param.model_parallel is True
    assert param.tensor_model_parallel is True
