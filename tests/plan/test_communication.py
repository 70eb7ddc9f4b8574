from __future__ import annotations

from megalibi.plan.communication import Collective, sum_sent_bytes


def test_ring_algorithms_send_so_much() -> None:
    collectives = [
        Collective("tensor", "all-reduce", 1000, 4),
        Collective("tensor", "all-reduce", 400, 4),
        Collective("data", "all-gather", 800, 2),
        Collective("data", "reduce-scatter", 800, 2),
    ]
    assert sum_sent_bytes(collectives) == {
        "tensor all-reduce": 2 * 750 + 2 * 300,
        "data all-gather": 400,
        "data reduce-scatter": 400,
    }
