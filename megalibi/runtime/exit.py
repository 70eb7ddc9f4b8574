"""How a process ends: what went wrong is one line and an exit code, for a command and for a rank of a job.

Exit codes: 0 done; 1 failed, with a traceback, or in one line for ranks that are missing or lost; 2 something that the
user can mend, such as a run that has diverged; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from megalibi import log
from megalibi.errors import FileError, LateRanksError, ShortageError, UserError, describe_os_error, spell_line
from megalibi.runtime.ranks import Place, find_place
from megalibi.runtime.shortage import ADVICE, find_shortage
from megalibi.runtime.spokesman import has_spoken, is_spokesman, tell_others

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_LOST = re.compile(
    r"(?P<closed>Connection closed by peer|Read error|Write error) \[(?P<address>[^\]]+)\]:\d+(: (?P<reset>[\w ]+))?"
)
"""What gloo says of a connection that is gone; NCCL's words name no address."""
_SPEAK_SECONDS = 2.0
"""How long a rank that does not speak waits for those that do."""
_RIGHTS = "ask its owner for the right to use it, or give another path"
_ADVICE = {
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: "give a path on a disk that can be written",
    errno.ENOSPC: "free space and start again",
    errno.EDQUOT: "free space and start again",
    errno.ENAMETOOLONG: "give a shorter name",
}


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main function and exit the process with what came of it.

    A UserError becomes ``error: MESSAGE`` on standard error and its exit code, and so does a file or folder that the
    user may not use. Ctrl-C, SIGTERM and the end of the terminal become exit code 130, after the command has removed
    what is half-written.

    Args:
        main: The command; what it returns is the exit code (None is 0).
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores the end of the terminal, and so do we
            signal.signal(number, _interrupt)
    try:
        with refuse_files():
            code = main()
    except UserError as error:
        _write_error(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        _write_error("interrupted")
        code = EXIT_INTERRUPTED
    sys.exit(code)


def run_rank(work: Callable[[Place], int | None]) -> NoReturn:
    """Do a rank's work and end the process with what came of it.

    A UserError is one line, which one rank says; anything else is a traceback that names rank and host.

    Args:
        work: The work, called with this process's place in the job; what it returns is the exit code (None is 0).
    """
    log.outlive_terminal()
    code = _run_rank(work)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: after a failure the threads of collectives that wait for a dead rank would hold the process.
    os._exit(code)


@contextlib.contextmanager
def refuse_files() -> Iterator[None]:
    """Turn the error of a file that cannot be used into one that the user can mend, whatever option or field names it.

    Raises:
        FileError: In place of an OSError that names a file, and of a name that this locale cannot write.
    """
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, (str, bytes, os.PathLike)):  # a connection, or our own mistake
            raise
        advice = _ADVICE.get(error.errno or 0, "give another path, or mend that one")
        raise FileError(f"{describe_os_error(error, os.fsdecode(error.filename))}; {advice}") from error
    except UnicodeEncodeError as error:
        raise FileError(
            f"{error.object!a} holds letters that cannot be written in this locale's encoding, {error.encoding}: "
            "set LC_ALL=C.UTF-8, or PYTHONUTF8=1"
        ) from error


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _run_rank(work: Callable[[Place], int | None]) -> int:
    place = None
    try:
        place = find_place(os.environ)
        log.configure(rank=place.rank, world_size=place.world_size)
        with refuse_files():
            return work(place) or 0
    except ShortageError as error:
        _write_error(str(error), place)  # by each rank, for it may be the only one
        return error.exit_code
    except LateRanksError as error:
        _say_on_each_host(error, place)
        return error.exit_code
    except UserError as error:
        _say(str(error), place)
        return error.exit_code
    except KeyboardInterrupt:
        if is_spokesman(place):
            _write_error("interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:
        lost = _describe_lost_connection(error)
        if lost is not None:
            _write_error(lost, place)  # by each rank: the first one's line has the host that the cause is on
            return EXIT_FAILED
        explained = _explain(error)
        if explained is None:
            log.get_logger(__name__).exception("failed")
            return EXIT_FAILED
        _write_error(explained, place)  # by each rank, for it may be the only one
        return EXIT_USER_ERROR


def _describe_lost_connection(error: Exception) -> str | None:
    """Return in one line that gloo has lost another rank, and where; None if the error is about something else."""
    found = _LOST.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    address, words = found["address"], found["reset"] or found["closed"]
    return (
        f"a rank at {address} has ended or is cut off ({words}): what it said last, or its launcher, has the cause; "
        "start the same command again"
    )


def _explain(error: Exception) -> str | None:
    """Return in one line what a user can mend; None if a traceback is needed."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full on {socket.gethostname()}: {error}; free space and start again"
    shortage = find_shortage(error)
    if shortage is not None:
        return f"not enough memory on {socket.gethostname()}, the {shortage.kind}'s: {shortage.said}; {ADVICE}"
    return None


def _say(message: str, place: Place | None) -> None:
    """Print an error that other ranks may have met too: the spokesman at once, another rank if it turns out alone."""
    if is_spokesman(place):
        _write_error(message, place)
        tell_others(place)
    elif not has_spoken(place):
        _write_error(message, place)


def _say_on_each_host(error: LateRanksError, place: Place | None) -> None:
    """Print that ranks are missing: by one rank of each host, since the hosts have logs of their own."""
    is_beside_rank_0 = place is not None and place.rank == place.local_rank
    if place is None or place.local_rank == 0 or (error.is_rank_0 and is_beside_rank_0):
        _write_error(str(error), place)
    else:
        time.sleep(_SPEAK_SECONDS)  # a launcher kills the others when the first rank ends


def _write_error(message: str, place: Place | None = None) -> None:
    """Write an error as one line, with the rank and its host if it is not rank 0."""
    where = f" [rank {place.rank}/{place.world_size} on {socket.gethostname()}]" if place and place.rank > 0 else ""
    sys.stderr.write(f"error: {spell_line(message)}{where}\n")
