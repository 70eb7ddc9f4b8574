"""Checks that all ranks start with the same configuration, and errors that end all ranks together."""

from __future__ import annotations

import contextlib
import hashlib
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalibi.errors import ConfigError, FileError, UserError, describe_os_error
from megalibi.parallel.collectives import all_gather_tensor
from megalibi.parallel.groups import Group


def gather_objects(value: Any, world: Group) -> list[Any]:
    """Return the values of all ranks, in the order of the ranks.

    It pickles, and takes milliseconds: use it for messages when a job starts or ends, and not in every step.
    """
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value, group=world.handle)
    return values


@contextlib.contextmanager
def refusing_together(world: Group, path: Path, advice: str = "") -> Iterator[None]:
    """Let an error that one rank meets end all of them: in a collective the others would wait for it for ever.

    Every rank must enter and leave.

    Args:
        world: All ranks.
        path: What is read or written; named if the error of the system names nothing.
        advice: What the user can do, put after what is wrong.

    Raises:
        UserError: On every rank, if a rank met one: the error of the lowest such rank, of the same kind, with the rank
            and its host.
        FileError: On every rank, if a rank could not use a file.
    """
    problem: tuple[type[UserError], str] | None = None
    try:
        yield
    except UserError as error:
        problem = type(error), str(error)
    except OSError as error:
        problem = FileError, describe_os_error(error, path)
    for met, rank, host in gather_objects((problem, world.rank, socket.gethostname()), world):
        if met is not None:
            kind, message = met
            raise kind(message + (f" (rank {rank} on {host})" if world.size > 1 else "") + advice)


def check_same(facts: Mapping[str, str], device: torch.device) -> None:
    """Check that all ranks have the same facts.

    Every rank must call it, and before process groups are built, because a rank may have another size for them. Where
    the ranks agree it costs one all-gather of 32 bytes a rank. Where they do not, rank 0 sends its facts to all ranks,
    and each rank finds what differs from its own.

    Args:
        facts: Values by name, in the order in which a difference is looked for.
        device: Where this rank's collectives take tensors.

    Raises:
        ConfigError: On every rank: the first fact that differs, both values, and the hosts.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    digest = hashlib.sha256(repr(list(facts.items())).encode()).digest()
    ours = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(device)
    all_digests = torch.empty(dist.get_world_size(), len(digest), dtype=torch.uint8, device=device)
    all_gather_tensor(all_digests.view(-1), ours)
    if bool((all_digests == all_digests[0]).all()):
        return
    told = [(dict(facts), socket.gethostname())]
    dist.broadcast_object_list(told, device=device)
    (theirs, their_host) = told[0]
    differing = [name for name in {**theirs, **facts} if theirs.get(name) != facts.get(name)]
    found = (differing, facts.get(differing[0]) if differing else None, socket.gethostname())
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    raise ConfigError(_describe(theirs, their_host, ranks))


def _describe(theirs: dict[str, str], their_host: str, ranks: list[Any]) -> str:
    """Return the message, which is about the lowest rank that differs and counts the others."""
    rank, ((name, *names), value, host) = next((rank, found) for rank, found in enumerate(ranks) if found[0])
    others = sum(1 for found in ranks if found[0]) - 1
    more = (f", and {len(names)} more" if names else "") + (f"; {others} more ranks differ" if others else "")
    return (
        f"the ranks do not agree: {name} is {theirs.get(name, 'not there')} on rank 0 (host {their_host}) and "
        f"{value if value is not None else 'not there'} on rank {rank} (host {host}){more}: start all ranks with the "
        "same configuration, data and code"
    )
