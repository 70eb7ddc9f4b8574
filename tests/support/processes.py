"""How the tests start a process of their own: forked from a server that has imported torch and DeepSpeed.

Importing both costs four seconds of a core in every process, a fork a hundredth of one. On a GPU each process begins
anew: to import DeepSpeed is to look for GPUs, and CUDA does not survive a fork.
"""

from __future__ import annotations

import multiprocessing as mp
from multiprocessing import forkserver

from tests.support.device import ON_GPU

CONTEXT = mp.get_context("spawn" if ON_GPU else "forkserver")
CONTEXT.set_forkserver_preload(["tests.support.preloaded"])


def start_server() -> None:
    """Start the server, which then imports on its own.

    A process has one server of forks, and whoever starts it says what it imports: a benchmark under test would.
    """
    if not ON_GPU:
        forkserver.ensure_running()
