"""What makes a folder a complete checkpoint: a manifest of its files with sizes and checksums.

A checkpoint is written into ``step_00000100.partial``; its files are synced to the disk, then the manifest, and then
the folder is renamed to ``step_00000100``. The rename is the moment at which it comes to exist: before it nothing reads
the folder, after it every byte is on the disk. Last, ``latest`` is replaced. A crash at any moment leaves the
checkpoint before, whole.

The manifest has a checksum of its own, in a file beside it, so that a flipped byte in any file of a checkpoint shows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalibi.errors import ConfigError
from megalibi.files import ASIDE_SUFFIX, sync_folder, write_aside, write_synced

MANIFEST = "manifest.json"
MANIFEST_CHECKSUM = "manifest.sha256"
LATEST = "latest"
CHECKPOINTS = "checkpoints"
PARTIAL_SUFFIX = ".partial"
_DISCARDED_SUFFIX = ".discarded"
_STEP_NAME = re.compile(r"step_(\d{8,})")
_HASH_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is and which files it has."""

    step: int
    """Optimizer steps done."""
    samples_consumed: int
    """Position in the data."""
    topology: dict[str, int]
    """World, tensor and data sizes and ZeRO stage that wrote it."""
    config: dict[str, Any]
    """The run's configuration."""
    derived: dict[str, Any]
    """What followed from it."""
    versions: dict[str, str]
    """Of megalibi and of the packages that decide the format."""
    files: dict[str, FileEntry]
    """By path inside the checkpoint."""
    data: dict[str, Any] = field(default_factory=dict)
    """What was learned from, a DataIdentity; empty in checkpoints that are older than this field."""
    run_id: str = ""
    """Of the run that wrote it; empty in checkpoints that are older than this field."""


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def commit(partial: Path, manifest: Manifest) -> Path:
    """Turn a folder with all files written and synced into a checkpoint, and let ``latest`` name it.

    Args:
        partial: The folder, ``step_00000100.partial``.
        manifest: Of its files.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: The disk is full or fails; the checkpoints before are untouched.
    """
    text = json.dumps(dataclasses.asdict(manifest), indent=1)
    write_synced(partial / MANIFEST, text.encode())
    write_synced(partial / MANIFEST_CHECKSUM, hashlib.sha256(text.encode()).hexdigest().encode())
    sync_folder(partial)
    final = partial.with_name(partial.name.removesuffix(PARTIAL_SUFFIX))
    old = None
    if final.exists():  # a run went back to an earlier checkpoint and came here again
        others = [checkpoint for checkpoint in list_checkpoints(final.parent) if checkpoint != final]
        if others and _read_latest(final.parent) == final.name:  # a crash now must not leave it naming nothing
            _replace_latest(others[-1])
        old = _put_aside(final)
    os.rename(partial, final)
    sync_folder(final.parent)
    _replace_latest(final)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _replace_latest(checkpoint: Path) -> None:
    latest = checkpoint.with_name(LATEST)
    if latest.is_symlink():  # somebody's, to a folder, which write_aside takes for no file
        aside = latest.with_name(f"{LATEST}{ASIDE_SUFFIX}")
        write_synced(aside, f"{checkpoint.name}\n".encode())
        os.replace(aside, latest)  # the link itself
        sync_folder(latest.parent)
    else:
        write_aside(latest, f"{checkpoint.name}\n")


def _read_latest(folder: Path) -> str | None:
    """Return the name that ``latest`` holds, or that of the checkpoint it is a link to; None: there is none."""
    latest = folder / LATEST
    if latest.is_symlink() and not latest.is_file():
        target = latest.resolve()
        return target.name if target.parent == folder.resolve() else os.readlink(latest)
    if latest.is_dir():
        raise ConfigError(
            f"{latest} is a folder: a file that holds the name of a checkpoint, or a link to one, is needed"
        )
    try:
        return latest.read_bytes().decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{latest} cannot be read: {error.strerror}") from error


def find_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that ``latest`` names, or the newest complete one if there is no ``latest``; None: none.

    Args:
        folder: A run's ``checkpoints``.

    Raises:
        ConfigError: ``latest`` names no checkpoint.
    """
    complete = list_checkpoints(folder)
    name = _read_latest(folder)
    if name is None:
        return complete[-1] if complete else None
    if folder / name not in complete:
        newest = complete[-1].name if complete else "none"
        raise ConfigError(
            f"{folder / LATEST} names {name!r}, which is no complete checkpoint; the newest one is {newest}"
        )
    return folder / name


def get_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a user names: a step's folder, or the latest of a run's folder or its ``checkpoints``.

    Raises:
        ConfigError: There is none.
    """
    if (path / MANIFEST).is_file():
        return path
    found = find_checkpoint(path / CHECKPOINTS) or find_checkpoint(path)
    if found is None:
        raise ConfigError(
            f"{path} is no checkpoint and has none: give a step's folder, a run's folder (its train.output_dir) or "
            f"its {CHECKPOINTS}"
        )
    return found


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest step first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP_NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check the manifest of a checkpoint, but not the files it lists.

    Raises:
        ConfigError: The folder is no checkpoint, or the manifest is damaged.
    """
    try:
        text = (checkpoint / MANIFEST).read_bytes()
        expected = (checkpoint / MANIFEST_CHECKSUM).read_bytes().decode(errors="replace")
    except OSError as error:
        raise ConfigError(
            f"{checkpoint} is no complete checkpoint: {error.filename}: {error.strerror}; give the path of a folder "
            "named step_NNNNNNNN"
        ) from error
    if hashlib.sha256(text).hexdigest() != expected:
        raise ConfigError(
            f"{checkpoint / MANIFEST} is damaged: it does not match {MANIFEST_CHECKSUM}; resume from another checkpoint"
        )
    try:
        fields = json.loads(text)
        files = {name: FileEntry(**entry) for name, entry in fields.pop("files").items()}
        return Manifest(**fields, files=files)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{checkpoint / MANIFEST} was not written by this version of megalibi: {error}; resume with the one "
            "that wrote it, or from another checkpoint"
        ) from error


def find_damage(checkpoint: Path, manifest: Manifest, *, part: int = 0, parts: int = 1) -> Iterator[str]:
    """Read files of a checkpoint and yield what is wrong, one line each; nothing if they are as they were written.

    Args:
        checkpoint: The folder.
        manifest: Of the folder.
        part: Which share of the files to read: ranks share the work.
        parts: Number of shares.
    """
    for name in sorted(manifest.files)[part::parts]:
        entry, path = manifest.files[name], checkpoint / name
        if not path.is_file():
            yield f"{path} is missing"
        elif path.stat().st_size != entry.size_bytes:
            yield f"{path} has {path.stat().st_size} bytes instead of {entry.size_bytes}"
        elif hash_file(path) != entry.sha256:
            yield f"{path} is damaged: its checksum is not the one in {MANIFEST}"


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def prune(folder: Path, keep: int, *, also_later: bool = True) -> None:
    """Delete what crashes left behind and all but the newest checkpoints.

    Args:
        folder: A run's ``checkpoints``.
        keep: How many to keep, always with the one that ``latest`` names; 0: all.
        also_later: Whether those beyond the latest go: what a run left that went back.
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
    """Delete a checkpoint; it stops to be one at once, so that a crash meanwhile leaves no half of one."""
    shutil.rmtree(_put_aside(checkpoint), ignore_errors=True)


def _put_aside(checkpoint: Path) -> Path:
    """Let a checkpoint be none any more, and return where its files are."""
    aside = checkpoint.with_name(checkpoint.name + _DISCARDED_SUFFIX)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(checkpoint, aside)
    sync_folder(aside.parent)  # else, after a power failure, its files may be gone and its old name be there again
    return aside
