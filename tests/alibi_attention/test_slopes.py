from __future__ import annotations

import pytest
import torch

from alibi_attention import alibi_slopes, local_slopes

EIGHT = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]
# fmt: off
SIXTEEN = [
    0.7071067812, 0.5, 0.3535533906, 0.25, 0.1767766953, 0.125, 0.08838834765, 0.0625,
    0.04419417382, 0.03125, 0.02209708691, 0.015625, 0.01104854346, 0.0078125, 0.005524271728, 0.00390625,
]
LITERAL = {
    8: EIGHT,
    12: [*EIGHT, 0.7071067812, 0.3535533906, 0.1767766953, 0.08838834765],
    16: SIXTEEN,
    20: [*SIXTEEN, 0.8408964153, 0.5946035575, 0.4204482076, 0.2973017788],
    24: [*SIXTEEN, 0.8408964153, 0.5946035575, 0.4204482076, 0.2973017788,
         0.2102241038, 0.1486508894, 0.1051120519, 0.07432544469],
}
# fmt: on


@pytest.mark.parametrize("num_heads", LITERAL)
def test_alibi_slopes_are_the_papers(num_heads):
    torch.testing.assert_close(alibi_slopes(num_heads), torch.tensor(LITERAL[num_heads]), rtol=0, atol=0)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 7, 71, 112])
def test_alibi_slopes_of_any_count_are_distinct_and_in_the_unit_interval(num_heads):
    slopes = alibi_slopes(num_heads)
    assert slopes.shape == (num_heads,)
    assert len(slopes.unique()) == num_heads
    assert ((slopes > 0) & (slopes < 1)).all()


@pytest.mark.parametrize(("num_heads", "tensor_parallel_size"), [(8, 4), (12, 4), (20, 4), (24, 8)])
def test_trap_2_slopes_are_keyed_by_global_head_id(num_heads, tensor_parallel_size):
    count = num_heads // tensor_parallel_size
    shards = [local_slopes(num_heads, rank * count, count) for rank in range(tensor_parallel_size)]
    assert torch.equal(torch.cat(shards), alibi_slopes(num_heads))
    assert not any(torch.equal(shard, alibi_slopes(count)) for shard in shards)


def test_bad_head_counts_and_ranges_are_refused():
    with pytest.raises(ValueError, match="num_heads=0: must be at least 1"):
        alibi_slopes(0)
    for start, count in ((-1, 2), (0, 0), (10, 3)):
        with pytest.raises(ValueError, match=rf"start={start}, count={count}: must name heads within 0\.\.11"):
            local_slopes(12, start, count)
