"""What a user can mend: each kind of error is one line that says what, where and what to do; no traceback."""

from __future__ import annotations

import errno
import os


class UserError(Exception):
    """Something that the user can mend. The command line prints the message as one line and exits with ``exit_code``.

    The message names the field, option or file, its value, and what is allowed:
    "parallel.tensor_parallel_size=3: must divide model.num_attention_heads=16".
    """

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A field of the configuration or an option of a command has a value that cannot be used."""


class DataError(UserError):
    """Text, a token file or a tokenizer cannot be used."""


class CheckpointError(UserError):
    """A checkpoint, or what else a run has left in its folder, cannot be read, used or written."""


class FileError(UserError):
    """A file or folder may not be read or written, or its disk is full."""


class JobError(UserError):
    """A process that the command had started has failed, or has died."""


class ShortageError(UserError):
    """The memory of this rank's GPU or host ran out; the other ranks may have enough."""


class LateRanksError(UserError):
    """Ranks were not there in time; where their hosts only began late, the next start finds them.

    Args:
        message: What the user sees.
        is_rank_0: Whether rank 0 is one of them, which would speak for its host.
    """

    exit_code = 1

    def __init__(self, message: str, *, is_rank_0: bool) -> None:
        super().__init__(message)
        self.is_rank_0 = is_rank_0


class DivergenceError(UserError):
    """The loss or the gradient is not finite: the same command would most likely come to the same end."""


def spell_line(text: str) -> str:
    """Return a message as one line of a terminal: what a file of others put into it can neither break nor steer it."""
    line = " ".join(text.split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


_MAX_NAME = 100
"""The most characters that a message shows of a name that is too long."""


def describe_os_error(error: OSError, path: str | os.PathLike[str]) -> str:
    """Return "FILE: what is wrong", in the words of the system.

    Args:
        error: What the system said.
        path: What was read or written; named if the error names no file, as that of a failing disk.
    """
    is_named = isinstance(error.filename, (str, bytes, os.PathLike))
    name = os.fsdecode(error.filename if is_named else path)
    if error.errno == errno.ENAMETOOLONG:
        name = f"{name[:_MAX_NAME]}..."
    return f"{name}: {error.strerror or error}"
