"""Let a run on two hosts meet random faults, start it again after each, and compare the end with an undisturbed run.

The hosts are namespaces of this machine, each with one rank, started by mpirun (data parallel 2, ZeRO 1, bf16). Kinds
of faults: kill -9 of one rank (kill_rank) or of both (kill_all); a rank that is stopped (hang); a host whose cable is
pulled until all ranks have ended (cut); SIGTERM to both ranks (preempt). Before each start the checkpoint that it will
take is verified. After every FAULTS_OF_A_ROUND of them the run is brought to an end, and its metrics.jsonl must equal
that of a run without faults, bit for bit; then another one begins. It needs root; Ctrl-C leaves no process and no host
behind, and the same command goes on with the round that was interrupted. ``kill_restart.py`` needs neither root nor a
launcher, and has kills alone.

Example:
    python tests/cluster/soak.py --times 500 --output results/soak.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from megalibi.console import Progress
from megalibi.files import write_json
from megalibi.metrics.provenance import describe_run
from megalibi.runtime.exit import run_tool
from tests.cluster.kill_restart import EVERY_STEPS, FOREVER, PACKAGES, require_equal_records, verified_step
from tests.cluster.lives import KINDS, Life, describe_life, summarize_lives
from tests.cluster.machines.debian import find_obstacle
from tests.cluster.machines.network import POLL_SECONDS, Hosts
from tests.cluster.machines.training import RUN_SECONDS, Launched, find_ranks, mpirun
from tests.support.jobs import last_step, write_job

NODES = ("node1", "node2")
FAULTS_OF_A_ROUND = 25
"""An interruption loses no more; the run without faults costs as much time as two."""
KILLED_WHILE_STARTING = 0.4
"""Share of the kills that come before the first step; there a hang would last ten minutes."""
STARTING_SECONDS = 4.0
"""Such a kill comes within so many seconds after both ranks are there."""
TRAINING_SECONDS = 2.0
"""Any other fault comes within so many seconds after the second step."""
HANG_SECONDS = 6.0
"""The limit of the watchdog: longer than a step or a checkpoint takes, however busy the machine is."""
END_SECONDS = 60.0
"""Within which all ranks have to end."""
LAUNCHER_SECONDS = 30.0
"""After which mpirun is killed, which does not always end after a cut; after any other fault it has to end."""
STEP_SECONDS = 5.0
"""Which no step of the undisturbed run takes, however busy the machine is; it has as many as all lives together."""
OF_THE_OTHERS = ("error: a rank at ", "error: rank 0 has ended ")
"""What ranks say that a fault or the watchdog has left alone."""
LOSS = " | loss "
"""What each step prints."""


def soak(hosts: Hosts, folder: Path, times: int, seed: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """Let a run meet so many faults; return what happened.

    Args:
        hosts: They are on, NODES among them.
        folder: For the run; every host sees it.
        times: The number of faults, of all kinds in turn, the order within each turn being random.
        seed: Of the order, the victims and the moments.
        progress: Where each fault is shown.

    Raises:
        AssertionError: A rank or the launcher did not end, nobody named the culprit, a restart did not take the last
            complete checkpoint, or the end differs from the undisturbed run's.
    """
    config = write_job(
        folder,
        model={"hidden_size": 192, "ffn_hidden_size": 768},
        train={"steps": FOREVER, "precision": "bf16"},
        checkpoint={"every_steps": EVERY_STEPS},
        runtime={"hang_timeout_seconds": HANG_SECONDS},
    )
    run, rng = folder / "run", random.Random(seed)
    lives: list[Life] = []
    for kind in _draw_kinds(rng, times):
        life, step_seconds = _live(hosts, config, kind, rng)
        if lives:
            lives[-1].restart_to_step_seconds = step_seconds
        lives.append(life)
        if progress:
            progress.show("faults", f"{len(lives)} of {times}, {describe_life(life)}", done=len(lives), total=times)
    steps = _read_step(run) + EVERY_STEPS
    began = time.monotonic()
    last = _start(hosts, config, f"train.steps={steps}")
    last.wait_until(lambda: LOSS in last.output)
    lives[-1].restart_to_step_seconds = round(time.monotonic() - began, 2)
    last.succeed()
    undisturbed = _start(hosts, config, f"train.steps={steps}", f"train.output_dir={folder}/undisturbed")
    undisturbed.succeed(RUN_SECONDS + steps * STEP_SECONDS)
    require_equal_records(run, folder / "undisturbed", steps)
    return {
        "faults": len(lives),
        "hang_timeout_seconds": HANG_SECONDS,
        "steps_in_the_end": steps,
        "metrics_equal_undisturbed_run": True,
        "lives": [dataclasses.asdict(life) for life in lives],
    }


def _draw_kinds(rng: random.Random, times: int) -> Iterator[str]:
    kinds: list[str] = []
    for _ in range(times):
        kinds = kinds or rng.sample(KINDS, len(KINDS))
        yield kinds.pop()


def _start(hosts: Hosts, config: Path, *overrides: str) -> Launched:
    return mpirun(hosts, dict.fromkeys(NODES, 1), config, *overrides)


def _live(hosts: Hosts, config: Path, kind: str, rng: random.Random) -> tuple[Life, float | None]:
    """Start the run, strike it, and return what happened, and the seconds to its first step if it came to one."""
    run = config.parent / "run"
    expected = _read_step(run)
    began = time.monotonic()
    launched, step_seconds = _start(hosts, config), None
    if kind.startswith("kill") and rng.random() < KILLED_WHILE_STARTING:
        launched.wait_until(lambda: len(_find_all_ranks(hosts)) == len(NODES))
        time.sleep(rng.uniform(0, STARTING_SECONDS))
    else:
        launched.wait_until(lambda: LOSS in launched.output)
        step_seconds = round(time.monotonic() - began, 2)
        # Then every rank has done its first step, before which its watchdog is patient.
        launched.wait_until(lambda: launched.output.count(LOSS) > 1)
        time.sleep(rng.uniform(0, TRAINING_SECONDS))
    assert launched.process.poll() is None, launched.output
    struck = time.monotonic()
    host = NODES[victim := rng.randrange(len(NODES))]
    _strike(hosts, kind, victim)
    ranks_end, launcher_end = wait_for_end(hosts, launched, struck, host if kind == "cut" else None)
    named = _check_words(launched, kind, victim, expected)
    life = Life(
        kind=kind,
        victim=host if kind == "cut" else "all ranks" if kind in ("kill_all", "preempt") else f"rank {victim}",
        phase="training" if LOSS in launched.output else "starting",
        resumed_from=expected,
        last_step=last_step(run),
        ranks_end_seconds=ranks_end,
        launcher_end_seconds=launcher_end,
        culprit_is_named=named if kind in ("hang", "cut") else None,
    )
    if kind == "preempt":
        assert _read_step(run) == life.last_step, launched.output
    return life, step_seconds


def _strike(hosts: Hosts, kind: str, victim: int) -> None:
    """Do to the run what the kind of fault says; the victim is the number of a rank and of its host."""
    if kind == "cut":
        hosts.cut(NODES[victim])
        return
    number = {"hang": signal.SIGSTOP, "preempt": signal.SIGTERM}.get(kind, signal.SIGKILL)
    for rank, pid in _find_all_ranks(hosts).items():
        if rank == victim or kind in ("kill_all", "preempt"):
            with suppress(ProcessLookupError):  # it has ended because the one before it has
                os.kill(pid, number)


def wait_for_end(hosts: Hosts, launched: Launched, struck: float, cut: str | None) -> tuple[float, float | None]:
    """Wait until all have ended: the ranks, then the launcher, which is killed if it does not end after a cut.

    Args:
        hosts: They are on, NODES among them.
        launched: The launcher.
        struck: The monotonic time of the fault.
        cut: The host without a cable, which gets it back when the ranks have ended; None: all have theirs.

    Returns:
        The seconds from the fault to the end of the last rank, and to that of the launcher: None if it was killed.

    Raises:
        AssertionError: The ranks did not end, or the launcher did not though no host was cut off.
    """
    while _find_all_ranks(hosts):
        assert time.monotonic() < struck + END_SECONDS, launched.output
        time.sleep(POLL_SECONDS)
    ranks_end = time.monotonic() - struck
    if cut:
        hosts.join(cut)
    try:
        launched.wait(LAUNCHER_SECONDS)
    except subprocess.TimeoutExpired:
        assert cut, launched.output
        for name in NODES:
            hosts.kill_all(name)
        launched.wait()
        return round(ranks_end, 2), None
    return round(ranks_end, 2), round(time.monotonic() - struck, 2)


def _check_words(launched: Launched, kind: str, victim: int, expected: int) -> bool:
    """Check what a life has said: where it went on, and that nothing ended it but the fault.

    Returns:
        Whether a rank named who holds it up.
    """
    said = launched.output
    assert all(int(step) == expected for step in re.findall(r"resumed from \S*step_(\d+)", said)), said
    assert (launched.process.returncode == 0) == (kind == "preempt"), said
    assert ("stopped by SIGTERM after step " in said) == (kind == "preempt"), said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if kind != "preempt":
        errors = [line for line in errors if not line.startswith(OF_THE_OTHERS)]
    assert all(line.startswith("error: no progress for ") for line in errors), said
    culprit = {
        "hang": f"; rank {victim} on {NODES[victim]} gives no sign of life (after step ",
        "cut": f"; all 2 ranks are in collectives: look at the network between {', '.join(NODES)}; ",
    }.get(kind)
    if culprit is None:
        assert not errors, said
    else:
        # Where a disk does not answer in time, a rank's watchdog can only write its stacks.
        assert errors or "Timeout (0:00:" in said, said
    return any(culprit is not None and culprit in line for line in errors)


def _find_all_ranks(hosts: Hosts) -> dict[int, int]:
    return {rank: pid for name in NODES for rank, pid in find_ranks(hosts, name).items()}


def _read_step(run: Path) -> int:
    return verified_step(run) if (run / "checkpoints" / "latest").exists() else 0


def main() -> None:
    """Make the hosts, run it and write what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=500, help="number of faults (default: 500)")
    parser.add_argument("--output", type=Path, help="JSON file to write, or to add rounds to", required=True)
    parser.add_argument("--notes", default="", help="what else was going on, for the JSON file")
    arguments = parser.parse_args()
    obstacle = find_obstacle()
    if obstacle is not None:
        parser.error(f"no hosts on this machine: {obstacle}")
    known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"rounds": []}
    if "rounds" not in known:
        parser.error(f"--output={arguments.output} is no file of this program's: give another one")
    rounds = known["rounds"]
    about = {"notes": arguments.notes} if arguments.notes else {}
    with tempfile.TemporaryDirectory() as name, Progress(line_every_seconds=0) as progress:
        folder = Path(name)
        with Hosts(NODES, folder / "hosts") as hosts:
            while (left := arguments.times - sum(one["faults"] for one in rounds)) > 0:
                began, seed = time.monotonic(), len(rounds)
                (folder / f"round{seed}").mkdir()
                done = soak(hosts, folder / f"round{seed}", min(left, FAULTS_OF_A_ROUND), seed, progress)
                done |= {"seed": seed, "seconds": round(time.monotonic() - began, 1)}
                rounds.append(about | describe_run("cpu", PACKAGES) | done)
                lives = [Life(**life) for one in rounds for life in one["lives"]]
                all_rounds = {"faults": len(lives), "recovery": summarize_lives(lives), "rounds": rounds}
                write_json(all_rounds, arguments.output)


if __name__ == "__main__":
    run_tool(main)
