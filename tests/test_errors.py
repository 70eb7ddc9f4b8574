from __future__ import annotations

import errno
from pathlib import Path

import pytest

from megalibi.errors import describe_os_error, spell_line

MISSING = OSError(errno.ENOENT, "No such file or directory", "a/b")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MISSING, "a/b: No such file or directory"),
        (OSError(errno.ENOENT, "No such file or directory", b"a/b"), "a/b: No such file or directory"),
        (OSError(errno.EIO, "Input/output error"), "read/this: Input/output error"),
        (OSError(errno.EIO, "Input/output error", 3), "read/this: Input/output error"),  # a descriptor is no name
        (OSError("no number"), "read/this: no number"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300), "n" * 100 + "...: File name too long"),
    ],
)
def test_an_error_of_the_system_names_its_file(error: OSError, said: str) -> None:
    assert describe_os_error(error, Path("read/this")) == said


def test_a_message_cannot_steer_a_terminal() -> None:
    """Whatever a file of others has put into it; letters of all scripts stay."""
    assert (
        spell_line("field \x1b[2J\r is\n  \u65e5\u672c\u202e na\u00efve\x00")
        == "field \\x1b[2J is \u65e5\u672c\\u202e na\u00efve\\x00"
    )
