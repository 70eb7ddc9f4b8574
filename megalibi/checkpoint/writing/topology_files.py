"""All files of a checkpoint at once, by one process: for a topology that need not be that of a run of this moment."""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from megalibi.checkpoint.manifest import FileEntry
from megalibi.checkpoint.parameters import ParameterEntry
from megalibi.checkpoint.tensors.state_file import (
    CONTENTS,
    WEIGHT,
    StateFileWriter,
    Stretch,
    cut_evenly,
    find_content,
    name_state_file,
)
from megalibi.errors import ConfigError

_OTHER_FILES = 64


def write_topology_files(
    folder: Path,
    *,
    parameters: Mapping[str, ParameterEntry],
    states: tuple[str, ...],
    tensor_parallel_size: int,
    data_parallel_size: int,
    read: Callable[[str, str, int], Tensor],
    show: Callable[[str, int, int], None],
) -> dict[str, FileEntry]:
    """Write the files of all ranks, which grow side by side, parameter by parameter.

    Args:
        folder: An existing folder.
        parameters: Every parameter by name, as it is cut there.
        states: The kinds of states that the optimizer has of each.
        tensor_parallel_size: The number of ranks over which each layer is cut.
        data_parallel_size: The number of data ranks, which share the slices of a tensor rank evenly.
        read: Returns a tensor rank's slice, [n] in fp32, of a parameter and a kind: the weight or one of ``states``.
            It is asked for the weight and then the states of a parameter, and for each kind rank after rank.
        show: Called before each parameter with its name, the number of those done, and of all.

    Returns:
        What was written, by the names of the files.

    Raises:
        ConfigError: A process may not have so many files open.
        OSError: The disk is full or fails.
    """
    allow_open_files(2 * tensor_parallel_size * data_parallel_size)
    cuts = {
        name: cut_evenly(math.prod(entry.local_shape(tensor_parallel_size)), data_parallel_size)
        for name, entry in parameters.items()
    }
    with contextlib.ExitStack() as opened:
        writers = {
            (content, tensor, data): opened.enter_context(
                _open_writer(folder, {name: cut[data] for name, cut in cuts.items()}, kinds, content, tensor, data)
            )
            for content, kinds in zip(CONTENTS, ((WEIGHT,), states), strict=True)
            for tensor in range(tensor_parallel_size)
            for data in range(data_parallel_size)
        }
        for done, name in enumerate(parameters):
            show(name, done, len(parameters))
            for kind in (WEIGHT, *states):
                for tensor in range(tensor_parallel_size):
                    local = read(name, kind, tensor)
                    for data, part in enumerate(cuts[name]):
                        writers[find_content(kind), tensor, data].write(local[part.start : part.stop])
        return {name_state_file(*place): writer.close() for place, writer in sorted(writers.items())}


def allow_open_files(number: int) -> None:
    """Let this process have so many files open beside those that it has.

    Args:
        number: The files that are written at once: two of each rank.

    Raises:
        ConfigError: The system does not allow so many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = number + _OTHER_FILES
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise ConfigError(
            f"{number} files are written at once, and a process may have {hard} open: raise `ulimit -Hn`, or take "
            "fewer ranks"
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _open_writer(
    folder: Path, parts: Mapping[str, range], kinds: tuple[str, ...], content: str, tensor: int, data: int
) -> StateFileWriter:
    stretches = [Stretch(kind, name, part.start, len(part)) for name, part in parts.items() for kind in kinds]
    return StateFileWriter(folder / name_state_file(content, tensor, data), tensor, stretches)
