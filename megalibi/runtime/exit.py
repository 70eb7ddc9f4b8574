"""How every command of megalibi ends: a user's mistake is one line and exit code 2."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from megalibi.errors import ConfigError, UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_MAX_NAME = 100
"""Characters of a name that is too long, in an error."""
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

    ConfigError becomes ``error: MESSAGE`` on standard error and exit code 2, and so does a file or folder that the user
    may not use. Ctrl-C, SIGTERM and the end of the terminal let the command remove what is half-written and become exit
    code 130.

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
        message = " ".join(str(error).split())
        sys.stderr.write(f"error: {message}\n")
        code = error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        code = EXIT_INTERRUPTED
    sys.exit(code)


@contextlib.contextmanager
def refuse_files() -> Iterator[None]:
    """Let a file that cannot be used be the user's to mend, in whatever option or field it stands.

    Raises:
        ConfigError: Instead of the OSError that names a file; and of a name that this locale cannot write.
    """
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, (str, bytes, os.PathLike)):  # a connection, or our own mistake
            raise
        name = os.fsdecode(error.filename)
        if error.errno == errno.ENAMETOOLONG:
            name = f"{name[:_MAX_NAME]}..."
        advice = _ADVICE.get(error.errno or 0, "give another path, or mend that one")
        raise ConfigError(f"{name}: {error.strerror}; {advice}") from error
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{error.object!a} holds letters that cannot be written in this locale's encoding, {error.encoding}: "
            "set LC_ALL=C.UTF-8, or PYTHONUTF8=1"
        ) from error


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
