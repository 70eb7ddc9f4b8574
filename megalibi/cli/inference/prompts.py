"""Where prompts come from: the lines of a file, a terminal, or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from megalibi.errors import DataError, FileError, describe_os_error


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a file that are not empty.

    Raises:
        DataError: The file is no UTF-8 text, or has no such line.
        FileError: It cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"--prompts: {describe_os_error(error, path)}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--prompts={path}: must be UTF-8 text: {error.reason} at byte {error.start}") from error
    prompts = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not prompts:
        raise DataError(f"--prompts={path}: must have a line that is not empty")
    return prompts


def iterate_typed() -> Iterator[str | None]:
    """Yield the lines of the terminal or of a pipe, up to the end; None for one that is not UTF-8 text."""
    if not sys.stdin.isatty():
        for line in sys.stdin.buffer:  # as bytes: a reader of text loses the lines around one that it cannot decode
            try:
                yield line.decode().removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError:
                yield None
        return
    while True:
        try:
            line_typed = input("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            print(flush=True)
        except UnicodeDecodeError:
            yield None
        else:
            yield line_typed
