"""Real ranks for tests: processes, started once per world size and kept for the whole test session.

They are on gloo, or with TEST_DEVICE=cuda on NCCL and a GPU each. ``processes`` says where they come from.

``run_on_ranks(4, fn, *args)`` calls ``fn(*args)`` in four processes that have initialised torch.distributed, and
returns the four results by rank. ``fn`` is a top-level function of a test file; it is found again in the ranks by
path and name, because test files are no importable modules. A rank that raises fails the call with its traceback,
and the pool is thrown away, for the other ranks may be stuck in a collective.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any

from tests.support.device import COLLECTIVES, ON_GPU
from tests.support.processes import CONTEXT

RANK_TIMEOUT_SECONDS = 300.0


def find_free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _load_module(path: str) -> ModuleType:
    name = "ranks_" + path.replace(os.sep, "_").removesuffix(".py")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _serve(rank: int, world_size: int, port: int, connection: Connection) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size)
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if ON_GPU:
        torch.cuda.set_device(rank)
    dist.init_process_group(COLLECTIVES, rank=rank, world_size=world_size)
    while True:
        try:
            path, name, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, getattr(_load_module(path), name)(*args, **kwargs)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


class _Pool:
    def __init__(self, world_size: int) -> None:
        port = find_free_port()
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        path = fn.__code__.co_filename
        for connection in self.connections:
            connection.send((path, fn.__name__, args, kwargs))
        results: dict[int, Any] = {}
        pending = dict(zip(self.connections, range(len(self.connections)), strict=True))
        while pending:
            ready = wait(list(pending), timeout=RANK_TIMEOUT_SECONDS)
            if not ready:
                raise TimeoutError(f"ranks {sorted(pending.values())} did not answer in {RANK_TIMEOUT_SECONDS:.0f} s")
            for connection in ready:
                rank = pending.pop(connection)  # type: ignore[call-overload]
                try:
                    ok, value = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, value = False, "the process died"
                if not ok:
                    raise AssertionError(f"rank {rank} of {len(self.connections)} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(len(self.connections))]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


_pools: dict[int, _Pool] = {}


def run_on_ranks(world_size: int, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """Call a top-level function of a test file on every rank of a world; return its results by rank."""
    if world_size not in _pools:
        _pools[world_size] = _Pool(world_size)
    try:
        return _pools[world_size].run(fn, args, kwargs)
    except BaseException:
        _pools.pop(world_size).stop()
        raise


@atexit.register
def _stop_all() -> None:
    for pool in _pools.values():
        pool.stop()
