"""Fuzz a parser for some minutes of the processor: `python -m tests.fuzz manifest --minutes 60 --findings found/`.

Ctrl-C ends it with what it has counted; `--seed` goes on from the round that it names. What is refused in one line is
as it should be; everything else is a finding, which is shrunk and kept as a file. An input that broke a parser and is
mended stays in tests/fuzz/found/TARGET/.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType

from hypothesis import HealthCheck, Phase, given, seed, settings

from megalibi.errors import UserError, spell_line
from megalibi.runtime.exit import run_tool
from tests.fuzz.targets import TARGETS, Target

SECONDS_OF_AN_INPUT = 20
"""Of the processor: on a busy machine a clock would say nothing of the input."""
SECONDS_WAITED = 600
"""Of the clock, for an input that makes a parser wait."""
MAX_MESSAGE = 1_000
SETTINGS = settings(
    max_examples=1_000,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)
"""Of a round, whose seed is that of the round before plus one."""


class SlowInputError(BaseException):
    """An input takes too long; no Exception, which a parser could take for its own."""


class LongMessageError(Exception):
    """A refusal that is no short line."""


def try_input(target: Target, content: bytes, folder: Path) -> bool:
    """Let a parser read an input; return whether it took it.

    Raises:
        LongMessageError: It was refused by a message that nobody would read.
        Exception: What the parser raised.
    """
    signal.setitimer(signal.ITIMER_PROF, SECONDS_OF_AN_INPUT)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_WAITED)
    try:
        target.read(content, folder)
    except UserError as error:
        if len(message := spell_line(str(error))) > MAX_MESSAGE:
            raise LongMessageError(f"a message of {len(message)} letters: {message[:MAX_MESSAGE]}") from error
        return False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return True


def spell_place(error: BaseException) -> str:
    """Return the kind of an error and where megalibi met it, by which two findings are one."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/megalibi/" in frame.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere of ours"
    return f"{type(error).__name__} at {where}"


def fuzz(name: str, *, seconds: float, first_seed: int, findings: Path) -> int:
    """Fuzz a parser; return the number of findings, each of which is kept once."""
    known: set[str] = set()
    found: dict[str, tuple[bytes, str]] = {}
    counts = {"tried": 0, "taken": 0}
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as place:
        target = TARGETS[name](Path(made))
        end = time.process_time() + seconds

        def attempt(content: bytes) -> None:
            if time.process_time() > end:
                return
            counts["tried"] += 1
            try:
                counts["taken"] += try_input(target, content, Path(place))
            except (Exception, SlowInputError) as error:
                where = spell_place(error)
                if where not in known:
                    found[where] = content, f"{error}"  # the last is the smallest
                    raise

        number = first_seed
        try:
            while time.process_time() < end:
                with contextlib.suppress(Exception, SlowInputError):
                    seed(number)(SETTINGS(given(target.inputs)(attempt)))()
                for where, (content, message) in found.items():
                    keep(findings, name, where, content, message)
                known.update(found)
                found.clear()
                number += 1
        finally:
            minutes = (seconds - end + time.process_time()) / 60
            say(
                f"{name}: {minutes:.1f} minutes of the processor, rounds {first_seed} to {number - 1}, "
                f"{counts['tried']:,} inputs, {counts['taken']:,} taken, {len(known)} findings"
            )
    return len(known)


def keep(findings: Path, name: str, where: str, content: bytes, message: str) -> None:
    """Write a finding to a file, and say so."""
    findings.mkdir(parents=True, exist_ok=True)
    kept = findings / f"{name}_{hashlib.sha256(content).hexdigest()[:12]}"
    kept.write_bytes(content)
    say(f"{name}: {where}: {message[:200]!r}; kept in {kept}")


def say(line: str) -> None:
    """Write a line to standard output."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def stop(signal_number: int, frame: FrameType | None) -> None:
    """An input takes too long."""
    raise SlowInputError(f"more than {SECONDS_OF_AN_INPUT} s of the processor, or {SECONDS_WAITED} s of waiting")


def main() -> int:
    """Fuzz the parsers that the command line names, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="parsers (all)")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the processor, for each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round (%(default)s)")
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="folder of what is found")
    arguments = parser.parse_args()
    signal.signal(signal.SIGPROF, stop)
    signal.signal(signal.SIGALRM, stop)
    names = arguments.targets or list(TARGETS)
    options = {"seconds": 60 * arguments.minutes, "first_seed": arguments.seed, "findings": arguments.findings}
    return 1 if sum(fuzz(name, **options) for name in names) else 0


if __name__ == "__main__":
    run_tool(main)
