"""A run's ``checkpoints`` folder: how a checkpoint comes to exist in it, is found, and goes.

A checkpoint is written into ``step_00000100.partial``. Its files are synced to the disk, then the manifest, and then
the folder is renamed to ``step_00000100``. The rename is the moment at which the checkpoint comes to exist: before it
nothing reads the folder, after it every byte is on the disk. Last, ``latest`` is replaced. A crash at any moment leaves
the checkpoint before, whole.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megalibi.checkpoint.manifest import MANIFEST, Manifest, write_manifest
from megalibi.errors import CheckpointError, FileError
from megalibi.files import rename_synced, sync_folder, write_aside
from megalibi.partial import PARTIAL_SUFFIX

LATEST = "latest"
CHECKPOINTS = "checkpoints"
_DISCARDED_SUFFIX = ".discarded"
_STEP_NAME = re.compile(r"step_(\d{8,})")


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def commit(partial: Path, manifest: Manifest) -> Path:
    """Turn a folder with all files written and synced into a checkpoint, and let ``latest`` name it.

    Args:
        partial: The folder, ``step_00000100.partial``.
        manifest: The description of its files.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: The disk is full or fails; the checkpoints before are untouched.
        CheckpointError: ``latest`` is a folder.
        FileError: ``latest`` may not be read.
    """
    write_manifest(partial, manifest)
    sync_folder(partial)
    final = partial.with_name(partial.name.removesuffix(PARTIAL_SUFFIX))
    old = None
    if final.exists():  # a run went back to an earlier checkpoint and came here again
        others = [checkpoint for checkpoint in list_checkpoints(final.parent) if checkpoint != final]
        if others and _read_latest(final.parent) == final.name:  # a crash now must not leave it naming nothing
            _replace_latest(others[-1])
        old = _put_aside(final)
    rename_synced(partial, final)
    _replace_latest(final)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _replace_latest(checkpoint: Path) -> None:
    # A user may have made it a link to a checkpoint's folder: the link is replaced, and the folder stays.
    write_aside(checkpoint.with_name(LATEST), f"{checkpoint.name}\n", replace_link=True)


def _read_latest(folder: Path) -> str | None:
    """Return the name that ``latest`` holds, or that of the checkpoint it is a link to; None: there is none."""
    latest = folder / LATEST
    if latest.is_symlink() and not latest.is_file():
        target = Path(os.path.realpath(latest))  # which, unlike resolve(), raises nothing for a link to itself
        return target.name if target.parent == folder.resolve() else os.readlink(latest)
    if latest.is_dir():
        raise CheckpointError(f"{latest} is a folder: must be a file with the name of a checkpoint, or a link to one")
    try:
        return latest.read_bytes().decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FileError(f"{latest} cannot be read: {error.strerror}") from error


def find_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that ``latest`` names, or the newest complete one if there is no ``latest``; None: none.

    Args:
        folder: A run's ``checkpoints``.

    Raises:
        CheckpointError: ``latest`` names no checkpoint.
        FileError: ``latest`` may not be read.
    """
    complete = list_checkpoints(folder)
    name = _read_latest(folder)
    if name is None:
        return complete[-1] if complete else None
    if folder / name not in complete:
        newest = complete[-1].name if complete else "none"
        raise CheckpointError(
            f"{folder / LATEST} names {name!r}, which is no complete checkpoint; the newest one is {newest}"
        )
    return folder / name


def get_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a user names: a step's folder, or the latest of a run's folder or its ``checkpoints``.

    Raises:
        CheckpointError: There is none.
        FileError: ``latest`` may not be read.
    """
    if (path / MANIFEST).is_file():
        return path
    found = find_checkpoint(path / CHECKPOINTS) or find_checkpoint(path)
    if found is None:
        raise CheckpointError(
            f"{path} is no checkpoint and has none: give a step's folder, a run's folder (its train.output_dir) or "
            f"its {CHECKPOINTS}"
        )
    return found


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the earliest step first.

    Args:
        folder: A run's ``checkpoints``; it need not exist.
    """
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP_NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def prune(folder: Path, keep: int, *, also_later: bool = True) -> None:
    """Delete what crashes left behind and all but the newest checkpoints; not while one is being written.

    Args:
        folder: A run's ``checkpoints``.
        keep: How many to keep, always with the one that ``latest`` names; 0: all.
        also_later: Whether to delete those after the latest, too: a run that went back has left them.
    """
    for leftover in [*folder.glob(f"*{PARTIAL_SUFFIX}"), *folder.glob(f"*{_DISCARDED_SUFFIX}")]:
        shutil.rmtree(leftover, ignore_errors=True)
    latest, checkpoints = find_checkpoint(folder), list_checkpoints(folder)
    if keep and latest is not None:
        place = checkpoints.index(latest)
        later = checkpoints[place + 1 :] if also_later else []
        for checkpoint in later + checkpoints[: max(0, place + 1 - keep)]:
            discard(checkpoint)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a crash meanwhile leaves no checkpoint with missing files."""
    shutil.rmtree(_put_aside(checkpoint), ignore_errors=True)


def _put_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint so that nothing takes it for one any more, and return its new path."""
    aside = checkpoint.with_name(checkpoint.name + _DISCARDED_SUFFIX)
    shutil.rmtree(aside, ignore_errors=True)
    rename_synced(checkpoint, aside)  # synced, or a power failure could bring back the name without the files
    return aside
