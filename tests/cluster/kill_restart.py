"""Kill -9 all ranks of a run at random moments, again and again, and compare the end with an undisturbed run.

Two ranks (tensor parallel 2, ZeRO 1, bf16) checkpoint every 2 steps, with a model that takes longer to save than to
step, so that kills hit the saving too. After each kill the checkpoint that the restart will take is verified, and the
restart must name it. At the end metrics.jsonl must equal that of a run that nobody killed, bit for bit.
It needs one host and no root; ``soak.py`` has other faults too, on two hosts under a launcher.

Example:
    python tests/cluster/kill_restart.py --times 30 --output results/kill_restart.json
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from megalibi.checkpoint import Checkpoint, find_checkpoint
from megalibi.metrics.provenance import describe_run
from tests.support.jobs import Job, exact_records, last_step, run_job, write_job

FOREVER = 1_000_000
EVERY_STEPS = 2
KILLED_WHILE_STARTING = 0.2
"""Share of the kills that come before the first step."""
CYCLES = 3
"""The other kills come within so many times the time from one checkpoint to the next."""


def kill_and_restart(folder: Path, times: int, seed: int = 0) -> dict[str, Any]:
    """Kill a run so many times; return what happened.

    Raises:
        AssertionError: A restart did not resume from the last complete checkpoint, or the end differs from the
            undisturbed run's.
    """
    config = write_job(
        folder,
        model={"hidden_size": 192, "ffn_hidden_size": 768},
        parallel={"tensor_parallel_size": 2},
        train={"steps": FOREVER, "precision": "bf16"},
        checkpoint={"every_steps": EVERY_STEPS},
    )
    run = folder / "run"
    rng = random.Random(seed)
    start_seconds, cycle_seconds = _measure(config, run)
    lives = [
        _live_and_die(config, run, rng, start_seconds=start_seconds, cycle_seconds=cycle_seconds) for _ in range(times)
    ]
    steps = verified_step(run) + EVERY_STEPS
    run_job(config, f"train.steps={steps}", world_size=2)
    run_job(config, f"train.steps={steps}", f"train.output_dir={folder}/undisturbed", world_size=2)
    require_equal_records(run, folder / "undisturbed", steps)
    return {
        "kills": len(lives),
        "killed_while": {phase: sum(life["phase"] == phase for life in lives) for phase in PHASES},
        "resumed_from_steps": [life["resumed_from"] for life in lives],
        "steps_when_killed": [life["killed_at"] for life in lives],
        "steps_in_the_end": steps,
        "metrics_equal_undisturbed_run": True,
    }


PHASES = ("starting", "stepping", "saving")


def _measure(config: Path, run: Path) -> tuple[float, float]:
    """Return the seconds to the first step and from one checkpoint to the next, and leave a run that was killed."""
    began = time.monotonic()
    job = Job(config, world_size=2)
    job.wait_until(lambda: last_step(run) >= 1)
    started = time.monotonic()
    job.wait_until(lambda: last_step(run) >= 1 + 2 * EVERY_STEPS)
    cycle_seconds = (time.monotonic() - started) / 2
    job.kill()
    return started - began, cycle_seconds


def _live_and_die(
    config: Path, run: Path, rng: random.Random, *, start_seconds: float, cycle_seconds: float
) -> dict[str, Any]:
    expected = verified_step(run)
    began = time.time()
    job = Job(config, world_size=2)
    if rng.random() < KILLED_WHILE_STARTING:
        time.sleep(rng.uniform(0, start_seconds))
    else:
        job.wait_until(lambda: " | loss " in job.read_log(0))
        time.sleep(rng.uniform(0, CYCLES * cycle_seconds))
    job.kill()
    log = job.read_log(0)
    assert "Traceback" not in job.output, job.output
    resumed = re.search(r"resumed from \S*step_(\d+)", log)
    if resumed:
        assert int(resumed[1]) == expected, (resumed[0], expected)
    phase = "starting" if " | loss " not in log else "saving" if _unfinished_save(run, began) else "stepping"
    return {"phase": phase, "resumed_from": expected, "killed_at": last_step(run)}


def _unfinished_save(run: Path, began: float) -> bool:
    """Return whether the life that began then left a checkpoint that ``latest`` does not name, whole or in part."""
    latest = find_checkpoint(run / "checkpoints")
    others = [path for path in (run / "checkpoints").glob("step_*") if latest is None or path.name > latest.name]
    return any(path.stat().st_mtime > began for path in others)


def verified_step(run: Path) -> int:
    """Return the step of the checkpoint that a restart takes, which must be whole."""
    checkpoint = Checkpoint.open(run)
    assert list(checkpoint.find_damage()) == []
    return checkpoint.manifest.step


def require_equal_records(run: Path, run_ref: Path, steps: int) -> None:
    """Require so many records of two runs, equal bit for bit."""
    records, records_ref = exact_records(run), exact_records(run_ref)
    assert len(records_ref) == steps
    assert records == records_ref, next(
        (pair for pair in zip(records, records_ref, strict=False) if pair[0] != pair[1]), (len(records), steps)
    )


def write_result(result: dict[str, Any], began: float, output: Path | None) -> None:
    """Write what happened, how long it took since the monotonic time, and what the figures depend on, as JSON.

    Args:
        result: What happened.
        began: The monotonic time of the beginning.
        output: The file; None: standard output.
    """
    text = json.dumps(
        result | {"seconds": round(time.monotonic() - began, 1)} | describe_run("cpu", PACKAGES), indent=1
    )
    if output:
        output.write_text(text + "\n", encoding="utf-8")
    else:
        sys.stdout.write(text + "\n")


PACKAGES = ("torch", "deepspeed")


def main() -> None:
    """Run it and write what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=30, help="number of kills (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: 0)")
    parser.add_argument("--output", type=Path, help="JSON file to write; standard output if not given")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = kill_and_restart(Path(folder), arguments.times, arguments.seed)
    write_result(result, began, arguments.output)


if __name__ == "__main__":
    main()
