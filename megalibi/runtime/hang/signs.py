"""Signs of life: each rank writes now and then where it is, into a small file that ranks of other hosts can read.

Files in the run's folder, and not messages to rank 0: they can be read when a rank is stopped, dead or cut off, rank 0
too. No clock of another host is trusted: what counts is whether a file changes while this rank looks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

SIGNS_FOLDER = "ranks"
"""Folder of a run's folder with a file for each rank that runs; it is removed at the end."""


@dataclass(frozen=True, kw_only=True)
class RankSign:
    """What a rank says of itself."""

    rank: int
    """The number of the rank in the job."""
    host: str
    """The name of the rank's host."""
    pid: int
    """The number of the rank's process on its host."""
    started: float
    """When the process began, in seconds since 1970, which tells it from a later one of the same number."""
    number: int
    """How many signs the rank has given, which changes while it lives."""
    progress: int
    """A count that changes while the rank makes progress."""
    step: int
    """The number of optimizer steps done."""
    marks: int
    """The number of places of the training loop that the rank has passed: the same where ranks are equally far."""
    words: str
    """What the rank waits in."""
    is_collective: bool
    """Whether it waits in a collective, for other ranks."""


@dataclass(kw_only=True)
class WatchedRank:
    """What this rank has seen of another one since it began to look."""

    sign: RankSign | None
    """The newest sign; None: there is none that can be read."""
    is_alive: bool
    """Whether a sign has come since this rank looks."""
    progress_seconds: float
    """The monotonic time at which its progress was last seen to change."""


class RankSigns:
    """The signs of the ranks of a run, of which this rank writes its own.

    Args:
        run_dir: The run's folder.
        rank: This rank.
        world_size: The number of ranks.
    """

    def __init__(self, run_dir: Path, rank: int, world_size: int) -> None:
        self._folder = run_dir / SIGNS_FOLDER
        self._rank, self._world_size = rank, world_size
        self.others: dict[int, WatchedRank] = {}
        """What was seen of the other ranks since the last ``forget``."""

    def give(self, sign: RankSign) -> None:
        """Write this rank's sign; a disk that fails costs only the sign, and so does a run's folder that has gone."""
        with contextlib.suppress(OSError):
            self._folder.mkdir(exist_ok=True)  # without its parents: a run that was refused leaves no folder
            self._path(self._rank).write_text(json.dumps(dataclasses.asdict(sign)) + "\n", encoding="utf-8")

    def remove(self) -> None:
        """Take this rank's sign away; the last rank takes the folder too."""
        with contextlib.suppress(OSError):
            self._path(self._rank).unlink(missing_ok=True)
            self._folder.rmdir()

    def clear(self) -> None:
        """Take the signs of all ranks away, of a run that ends before its first step."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def forget(self) -> None:
        """Begin anew to look at the others."""
        self.others = {}

    def look(self, now: float) -> None:
        """Read the other ranks' signs.

        Args:
            now: The monotonic time.
        """
        for rank in range(self._world_size):
            if rank == self._rank:
                continue
            sign, seen = self._read(rank), self.others.get(rank)
            if seen is None:  # whether it is an old one shows later
                self.others[rank] = WatchedRank(sign=sign, is_alive=False, progress_seconds=now)
            elif sign is not None and sign != seen.sign:
                if seen.sign is None or sign.progress != seen.sign.progress:
                    seen.progress_seconds = now
                seen.sign, seen.is_alive = sign, True

    def _read(self, rank: int) -> RankSign | None:
        """Return a rank's sign; None: there is none, or it is being written."""
        try:
            fields = json.loads(self._path(rank).read_bytes())
            return RankSign(**fields)
        except (OSError, ValueError, TypeError):
            return None

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.json"
