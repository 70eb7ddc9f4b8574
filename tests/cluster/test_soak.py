"""A run on two hosts that meets random faults, and what the soak makes of a launcher that does not end."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from tests.cluster import soak as soak_module
from tests.cluster.lives import KINDS, Life, describe_life
from tests.cluster.machines.network import Hosts
from tests.cluster.machines.training import Launched
from tests.cluster.soak import NODES, soak, wait_for_end

pytestmark = pytest.mark.cluster

FAULTS = 20
SOAK_SECONDS = 2400
"""For so many faults, however busy the machine is; results/soak.json has 20 s for each, the last runs included."""
SLEEP = "import time; time.sleep(1000)"


@pytest.mark.timeout(SOAK_SECONDS)
def test_a_run_that_meets_random_faults_ends_as_if_nothing_had_happened(hosts: Hosts, tmp_path: Path) -> None:
    result = soak(hosts, tmp_path, FAULTS)
    assert result["metrics_equal_undisturbed_run"]
    lives = result["lives"]
    assert {kind: sum(life["kind"] == kind for life in lives) for kind in KINDS} == dict.fromkeys(KINDS, FAULTS // 5)
    steps = [life["resumed_from"] for life in lives]
    assert steps == sorted(steps)
    assert all(life["last_step"] >= life["resumed_from"] for life in lives)
    assert result["steps_in_the_end"] > steps[-1] > 0


def test_results_of_another_form_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "soak.json"
    old.write_text('{"faults": 25}')
    monkeypatch.setattr(sys, "argv", ["soak.py", "--output", str(old)])
    with pytest.raises(SystemExit, match="2"):
        soak_module.main()
    assert f"--output={old} is no file of this program's: give another one" in capsys.readouterr().err
    assert old.read_text() == '{"faults": 25}'


def test_an_mpirun_that_does_not_end_after_a_cut_is_killed(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak_module, "LAUNCHER_SECONDS", 1.0)
    command = ["mpirun", "--host", ",".join(f"{name}:1" for name in NODES), sys.executable, "-S", "-c", SLEEP]
    launched = Launched(hosts, NODES[0], command, tmp_path)

    def find_sleepers() -> dict[str, list[int]]:
        return {name: hosts.find_processes(name, f"{sys.executable} -S -c {SLEEP}") for name in NODES}

    # Its ranks are none that the soak knows of: they go on, and so does mpirun.
    launched.wait_until(lambda: all(find_sleepers().values()))
    hosts.cut(NODES[1])
    struck = time.monotonic()
    ranks_end_seconds, launcher_end_seconds = wait_for_end(hosts, launched, struck, NODES[1])
    assert launcher_end_seconds is None
    assert launched.process.returncode == -signal.SIGKILL
    assert not any(find_sleepers().values())
    hosts.wait_for_ssh(NODES[1])
    life = Life(
        kind="cut",
        victim=NODES[1],
        phase="training",
        resumed_from=2,
        last_step=3,
        ranks_end_seconds=ranks_end_seconds,
        launcher_end_seconds=None,
        culprit_is_named=True,
    )
    assert describe_life(life) == "cut of node2 after step 3: mpirun had to be killed"
