"""Runs a script, or launch/pretrain.py, as a user whom permissions bind: root, as in containers, may read everything.

It gives up the capabilities that let a process pass over permissions, for itself alone (capset(2), capabilities(7)).
"""

from __future__ import annotations

import ctypes
import runpy
import sys
from pathlib import Path

PRETRAIN = Path(__file__).parents[2] / "launch" / "pretrain.py"
_VERSION = 0x20080522


def give_up_privileges() -> None:
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    give_up_privileges()
    script = str(PRETRAIN)
    if sys.argv[1].endswith(".py"):
        script = sys.argv[1]
        del sys.argv[0]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
