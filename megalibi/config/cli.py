"""How every command of megalibi ends: a user's mistake is one line and exit code 2."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from megalibi.config.errors import ConfigError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


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
        with refuse_long_names():
            code = main()
    except ConfigError as error:
        message = " ".join(str(error).split())
        sys.stderr.write(f"error: {message}\n")
        code = EXIT_USER_ERROR
    except PermissionError as error:
        if error.filename is None:
            raise
        sys.stderr.write(f"error: {error.filename}: {error.strerror}\n")
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        code = EXIT_INTERRUPTED
    sys.exit(code)


@contextlib.contextmanager
def refuse_long_names() -> Iterator[None]:
    """Let a name that no file can have be the user's mistake, in whatever option or field it stands.

    Raises:
        ConfigError: Instead of the OSError that says so.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise ConfigError(f"{str(error.filename)[:100]}...: {error.strerror}") from error


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
