from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.machines.debian import find_obstacle
from tests.cluster.machines.network import Hosts
from tests.cluster.machines.training import make_job, torchrun
from tests.support.jobs import exact_records

NODES = ("node1", "node2", "node3", "node4")
HEAD = "head"
"""The host of slurmctld."""
Records = list[dict[str, Any]]


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """The hosts, on all the time."""
    obstacle = find_obstacle()
    if obstacle is not None:
        pytest.skip(f"no hosts on this machine: {obstacle}")
    with Hosts([*NODES, HEAD], tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture
def hosts(network: Hosts) -> Iterator[Hosts]:
    """The hosts, as new: what a test has started ends with it, and what it has changed is mended."""
    yield network
    network.restore()


@pytest.fixture(scope="session")
def records_ref(network: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Records:
    """What four ranks record on one host in the run of ``make_job``."""
    config = make_job(tmp_path_factory.mktemp("one_host"))
    (launched,) = torchrun(network, ["node1"], 4, config)
    launched.succeed()
    return exact_records(config.parent / "run")
