"""Where this rank is, read from the Python stacks of its threads: in which collective, a data read, or what else.

Nothing is noted while the rank works, so that it costs nothing and DeepSpeed's collectives are found like our own.
"""

from __future__ import annotations

import linecache
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

import megalibi
from megalibi.parallel import Group
from megalibi.parallel.collectives import Pending

_ROOT = Path(megalibi.__file__).parents[1]
_STANDARD_LIBRARY = Path(threading.__file__).parent
_COMMUNICATION = ("torch/distributed/", "deepspeed/comm/", "megalibi/parallel/collectives.py")
"""Sources whose functions wait for other ranks."""
_KINDS = (
    ("megalibi/data/", "a data read"),
    ("megalibi/checkpoint/", "the saving or loading of a checkpoint"),
    ("megalibi/metrics/", "the writing of records"),
)
"""What a rank does whose stack has a function of such a source; the first that fits."""
_MAX_RANKS = 8
"""The most ranks of a group that are listed."""


@dataclass(frozen=True, kw_only=True)
class Whereabouts:
    """Where a rank is."""

    words: str
    """What the rank waits in, to follow "waits in", with file and line."""
    is_collective: bool
    """Whether it waits in a collective, for other ranks."""


def find_whereabouts() -> Whereabouts:
    """Return where this process's main thread is; any thread may call it, whatever the main thread does."""
    frames = sys._current_frames()
    main = list(_callers(frames.pop(threading.main_thread().ident or 0, None)))
    # On a GPU the backward pass runs in threads of autograd, for which the main thread waits.
    for stack in (main, *(list(_callers(frame)) for frame in frames.values())):
        if (collective := _name_collective(stack)) is not None:
            return Whereabouts(words=f"{collective} ({_describe_caller(stack)})", is_collective=True)
    paths = [_shorten(frame) for frame in main]
    for folder, words in _KINDS:
        for frame, path in zip(main, paths, strict=True):
            if path.startswith(folder):
                inside = "" if frame is main[0] else f"; innermost {_describe(main[0])}"
                return Whereabouts(words=f"{words} ({_describe(frame)}{inside})", is_collective=False)
    where = _describe(main[0]) if main else "its main thread has ended"
    return Whereabouts(words=f"Python code ({where})", is_collective=False)


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame and those that called it, the innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _shorten(frame: FrameType) -> str:
    """Return the path of a frame's source from the name of its package on."""
    path = Path(frame.f_code.co_filename)
    if path.parent == _STANDARD_LIBRARY:
        return path.name
    if path.is_relative_to(_ROOT) and "site-packages" not in path.relative_to(_ROOT).parts:
        return path.relative_to(_ROOT).as_posix()
    return path.as_posix().rpartition("site-packages/")[2]


def _describe(frame: FrameType) -> str:
    return f"{_shorten(frame)}:{frame.f_lineno}, {frame.f_code.co_name}"


def _describe_caller(stack: Sequence[FrameType]) -> str:
    """Return the place in our code, or in DeepSpeed's, from which a collective was called."""
    callers = [frame for frame in stack if not _is_communication(frame)]
    ours = (frame for frame in callers if _shorten(frame).startswith(("megalibi/", "deepspeed/")))
    return _describe(next(ours, (callers or stack)[0]))


def _is_communication(frame: FrameType) -> bool:
    return _shorten(frame).startswith(_COMMUNICATION)


def _name_collective(stack: Sequence[FrameType]) -> str | None:
    """Return the name of the collective in which a thread waits, with its ranks; None if it waits in none."""
    inside = list(takewhile(_is_communication, stack))
    for frame in inside:
        waited = frame.f_locals.get("self")
        if isinstance(waited, Pending) and waited.group is not None:
            return f"{waited.name} of {_describe_group(waited.group)}"
        if "group" in frame.f_locals:
            name = re.sub("(_raw|_async|_)+$", "", frame.f_code.co_name)
            return f"{name} of {_describe_group(frame.f_locals['group'])}"
    if inside:
        return f"{inside[-1].f_code.co_name} of torch.distributed"
    if stack and _shorten(stack[0]).startswith("deepspeed/"):  # it waits for handles of its own
        frame = stack[0]
        if re.search(r"\.wait\(|\.synchronize\(", linecache.getline(frame.f_code.co_filename, frame.f_lineno)):
            return "a collective of DeepSpeed"
    return None


def _describe_group(group: Any) -> str:
    """Return the ranks of a group of ours or of torch's; None is the group of all."""
    try:
        ranks = group.ranks if isinstance(group, Group) else dist.get_process_group_ranks(group or dist.group.WORLD)
    except (ValueError, KeyError, RuntimeError, AttributeError):  # the group is gone
        return "a group"
    return describe_ranks(list(ranks))


def describe_ranks(ranks: Sequence[int]) -> str:
    """Return ranks in words: "ranks 0-7", "ranks 0, 4, 8", or "8 ranks from 0 to 56".

    Args:
        ranks: The numbers of the ranks, rising.
    """
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    if len(ranks) <= _MAX_RANKS:
        return f"ranks {', '.join(map(str, ranks))}"
    return f"{len(ranks)} ranks from {ranks[0]} to {ranks[-1]}"
