"""One training over several hosts, whoever starts it; the hosts are namespaces of this machine."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megalibi.config import load_config
from tests.cluster.conftest import NODES, Records
from tests.cluster.machines.network import SILENT_NAME_SERVER, Hosts
from tests.cluster.machines.training import (
    ROOT,
    STEPS,
    Launched,
    deepspeed,
    find_ranks,
    make_job,
    mpirun,
    torchrun,
)
from tests.support.faults import change_byte
from tests.support.jobs import SCRIPT, exact_records, last_step, write_job

pytestmark = pytest.mark.cluster

UNKNOWN_SECONDS = 60.0
"""Within which it is said that nobody knows a host, where the name server is silent: a start, and 10 s a look-up."""
SLOW_NAMES_SECONDS = 180.0
"""Within which a small run ends where the name server is silent: torch looks names up, in vain, some times."""
RTOL_TOPOLOGY = 1e-5
"""Of losses and gradient norms of two topologies, in fp32."""


def find_listening(hosts: Hosts, host: str) -> set[tuple[str, str]]:
    """Return the addresses and ports at which the ranks of a host listen."""
    ranks = find_ranks(hosts, host).values()
    sockets = {os.readlink(entry) for pid in ranks for entry in Path(f"/proc/{pid}/fd").iterdir()}
    lines = [line.split() for line in hosts.run(host, "ss", "-Htlne").splitlines()]
    return {
        (address, port)
        for line in lines
        for inode in re.findall(r"\bino:(\d+)", " ".join(line))
        if f"socket:[{inode}]" in sockets
        for address, _, port in [line[3].rpartition(":")]
    }


def test_deepspeed_over_two_hosts_trains_as_one_host_does(hosts: Hosts, records_ref: Records, tmp_path: Path) -> None:
    config = make_job(tmp_path)
    # Quoted twice, as a user's shell hands them on: a shell of each host reads them once more.
    quoted = ["'data.skip=[900-903,910]'", "'checkpoint.keep=${checkpoint.every_steps}'"]
    launched = deepspeed(hosts, {"node1": 2, "node2": 2}, config, *quoted)
    launched.wait_until(lambda: last_step(tmp_path / "run") >= 1)
    # The ranks of a tensor group have numbers that follow each other: both are on one host.
    ranks = {host: sorted(find_ranks(hosts, host)) for host in ("node1", "node2")}
    launched.succeed()
    assert ranks == {"node1": [0, 1], "node2": [2, 3]}
    assert exact_records(tmp_path / "run") == records_ref
    told = load_config(tmp_path / "run" / "config.yaml", [])
    assert (told.data.skip, told.checkpoint.keep) == (("900-903", "910"), 2)


def test_deepspeed_over_four_hosts_trains_as_two_do(hosts: Hosts, records_ref: Records, tmp_path: Path) -> None:
    config = make_job(tmp_path)
    deepspeed(hosts, dict.fromkeys(NODES, 2), config).succeed()
    records = exact_records(tmp_path / "run")
    assert [record["sample_hash"] for record in records] == [record["sample_hash"] for record in records_ref]
    for name in ("loss", "grad_norm"):
        expected = [record[name] for record in records_ref]
        assert [record[name] for record in records] == pytest.approx(expected, rel=RTOL_TOPOLOGY)


def test_torchrun_on_every_host(hosts: Hosts, records_ref: Records, tmp_path: Path) -> None:
    config = make_job(tmp_path)
    for launched in torchrun(hosts, ["node1", "node2"], 2, config):
        launched.succeed()
    assert exact_records(tmp_path / "run") == records_ref


def test_mpirun_over_two_hosts(hosts: Hosts, records_ref: Records, tmp_path: Path) -> None:
    config = make_job(tmp_path)
    launched = mpirun(hosts, {"node1": 2, "node2": 2}, config)
    launched.wait_until(lambda: last_step(tmp_path / "run") >= 1)
    listening = {host: find_listening(hosts, host) for host in ("node1", "node2")}
    launched.succeed()
    assert exact_records(tmp_path / "run") == records_ref
    # The store of rank 0 and gloo's sockets: each at the address by which the hosts know each other, and at no other.
    assert {host: {address for address, _ in places} for host, places in listening.items()} == {
        host: {hosts.addresses[host]} for host in ("node1", "node2")
    }
    assert {host for host, places in listening.items() if "29500" in {port for _, port in places}} == {"node1"}


def change_data(folder: Path) -> str:
    for suffix in (".bin", ".idx"):
        shutil.copy(folder / f"tokens{suffix}", folder / f"stale{suffix}")
    change_byte(folder / "stale.bin", 10_000)
    return f"data.train={folder}/stale"


def change_code(folder: Path) -> str:
    for name in ("megalibi", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "megalibi" / "log.py").open("a") as file:
        file.write("# A checkout of yesterday.\n")
    return f"PYTHONPATH={folder}:{folder / 'kernels'}"


def change_library(folder: Path) -> str:
    (folder / "numpy-1.0.dist-info").mkdir()
    (folder / "numpy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n")
    return f"PYTHONPATH={folder}:{ROOT}:{ROOT / 'kernels'}"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda _: "train.seed=7", "train.seed is 1234 on rank 0 (host node1) and 7 on rank 1 (host node2)"),
        (change_data, r"data.train[0] is of weight 1.0, 20,000 tokens in 21 documents, sha256 of .idx "),
        (change_code, "the code of megalibi is sha256 "),
        (change_library, f"the version of numpy is {np.__version__} on rank 0 (host node1) and 1.0 on rank 1 (host "),
    ],
    ids=["config", "data", "code", "library"],
)
def test_a_host_that_has_something_else_is_refused_by_all(
    change: Callable[[Path], str], expected: str, hosts: Hosts, tmp_path: Path
) -> None:
    config = make_job(tmp_path, tensor_parallel_size=1)
    changed = change(tmp_path)
    own = {"before_the_last": ["env", changed]} if changed.startswith("PYTHONPATH=") else {"of_the_last": [changed]}
    launched = torchrun(hosts, ["node1", "node2"], 1, config, **own)
    assert [each.wait() for each in launched] == [1, 1]  # torchrun's code for any other than 0
    (said,) = [line for each in launched for line in each.output.splitlines() if line.startswith("error: ")]
    assert said.startswith(f"error: the ranks do not agree: {expected}")
    assert re.search(r" on rank 0 \(host node1\) and .* on rank 1 \(host node2\): start all ranks with the same ", said)
    assert not (tmp_path / "run").exists()


def start_by_torchrun(hosts: Hosts, config: Path) -> list[Launched]:
    return torchrun(hosts, ["node1", "node2"], 2, config)


def start_by_mpirun(hosts: Hosts, config: Path) -> list[Launched]:
    return [mpirun(hosts, {"node1": 2, "node2": 2}, config)]


@pytest.mark.parametrize(("start", "warnings"), [(start_by_torchrun, 0), (start_by_mpirun, 1)])
def test_hosts_whose_own_names_are_loopback_addresses(
    start: Callable[[Hosts, Path], list[Launched]],
    warnings: int,
    hosts: Hosts,
    records_ref: Records,
    tmp_path: Path,
) -> None:
    for name in ("node1", "node2"):
        hosts.map_own_name(name, "127.0.1.1")
    launched = start(hosts, make_job(tmp_path))
    for each in launched:
        each.succeed()
    assert exact_records(tmp_path / "run") == records_ref
    # Where no agent of torchrun keeps the store, rank 0 says that it listens everywhere.
    said = "MASTER_ADDR=node1: rank 0's host node1 listens at port 29500 on all of its addresses"
    assert sum(each.output.count(said) for each in launched) == warnings


def test_a_name_server_that_does_not_answer(hosts: Hosts, tmp_path: Path) -> None:
    for name in ("node1", "node2"):
        hosts.set_name_server(name, SILENT_NAME_SERVER)
    config = make_job(tmp_path)
    command = ["mpirun", "--host", "node1:2,node2:2", "-x", "PATH", "-x", "PYTHONPATH", "-x", "MASTER_ADDR=node9"]
    launched = Launched(hosts, "node1", [*command, "python", str(SCRIPT), "--config", str(config)], tmp_path)
    assert launched.wait(UNKNOWN_SECONDS) == 2
    # mpirun kills the others as soon as one has said it.
    assert re.search(r"^error: MASTER_ADDR=node9: node[12] knows no such host \(Temp", launched.output, re.MULTILINE)
    # Where /etc/hosts has the names the run begins late.
    deepspeed(hosts, {"node1": 1, "node2": 1}, write_job(tmp_path)).succeed(SLOW_NAMES_SECONDS)
    assert last_step(tmp_path / "run") == STEPS


def test_two_jobs_on_one_folder_over_hosts_of_their_own(hosts: Hosts, tmp_path: Path) -> None:
    config = make_job(tmp_path)
    first, _ = torchrun(hosts, ["node1", "node2"], 1, config, "train.steps=1000000")
    first.wait_until(lambda: last_step(tmp_path / "run") >= 1)
    second, _ = torchrun(hosts, ["node3", "node4"], 1, config, "train.steps=1000000")
    assert second.wait() == 1  # torchrun's code for any other than 0
    said = [line for line in second.output.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "is in use" in said[0]
    before = last_step(tmp_path / "run")
    first.wait_until(lambda: last_step(tmp_path / "run") > before)
