"""The files of a rank in a checkpoint: what belongs into them, and writing them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megalibi.checkpoint.manifest import FileEntry
from megalibi.checkpoint.tensors.state_file import (
    CONTENTS,
    WEIGHT,
    StateFileWriter,
    Stretch,
    cut_evenly,
    find_content,
    name_state_file,
)
from megalibi.engine.masters import Master
from megalibi.parallel import ProcessGroups

FileContents = Mapping[str, list[tuple[Stretch, Tensor]]]
"""By the name of a file: what it shall hold, in its order, and the elements of each stretch, [n]."""


@dataclass(frozen=True)
class RankFiles:
    """What a rank writes into a checkpoint."""

    tensor_rank: int
    """The tensor rank of whose slices it is."""
    contents: FileContents
    """What each of its files shall hold."""


def list_rank_files(masters: Iterable[Master], stage: int, groups: ProcessGroups) -> RankFiles:
    """Return what a rank writes: views of what its optimizer holds, and no copies.

    Args:
        masters: What its optimizer holds, from find_masters.
        stage: The stage of ZeRO. At ZeRO 0 all data ranks hold the same, and each writes its share.
        groups: The groups of this process.
    """
    names = {content: name_state_file(content, groups.tensor.rank, groups.data.rank) for content in CONTENTS}
    contents: dict[str, list[tuple[Stretch, Tensor]]] = {name: [] for name in names.values()}
    for master in masters:
        share = range(len(master.weight))
        if stage == 0:
            share = cut_evenly(len(share), groups.data.size)[groups.data.rank]
        for kind, values in {WEIGHT: master.weight, **master.states}.items():
            stretch = Stretch(kind, master.name, master.start + share.start, len(share))
            contents[names[find_content(kind)]].append((stretch, values[share.start : share.stop]))
    return RankFiles(groups.tensor.rank, contents)


def write_rank_files(folder: Path, files: RankFiles) -> dict[str, FileEntry]:
    """Write a rank's files and wait for the disk; return their sizes and checksums by name.

    Raises:
        OSError: The disk is full or fails.
    """
    written = {}
    for name, stretches in files.contents.items():
        with StateFileWriter(folder / name, files.tensor_rank, [stretch for stretch, _ in stretches]) as writer:
            for _, values in stretches:
                writer.write(values)
            written[name] = writer.close()
    return written
