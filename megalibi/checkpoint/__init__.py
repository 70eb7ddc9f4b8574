"""Checkpoints that survive a crash at any moment."""

from megalibi.checkpoint.checkpoint import Checkpoint
from megalibi.checkpoint.folder import CHECKPOINTS, LATEST, checkpoint_name, find_checkpoint, list_checkpoints, prune
from megalibi.checkpoint.lock import RunLock
from megalibi.checkpoint.manifest import MANIFEST, Manifest, read_manifest, spell_topology
from megalibi.checkpoint.resume import (
    IMPORTED_DATA,
    check_resumable,
    describe_changes,
    find_left_out,
    find_refusals,
    find_said_changes,
    load_checkpoint,
)
from megalibi.checkpoint.writing.description import SavedRun
from megalibi.checkpoint.writing.save import CheckpointSaver, save_checkpoint
from megalibi.checkpoint.writing.snapshot import ELEMENT_BYTES

__all__ = [
    "CHECKPOINTS",
    "ELEMENT_BYTES",
    "IMPORTED_DATA",
    "LATEST",
    "MANIFEST",
    "Checkpoint",
    "CheckpointSaver",
    "Manifest",
    "RunLock",
    "SavedRun",
    "check_resumable",
    "checkpoint_name",
    "describe_changes",
    "find_checkpoint",
    "find_left_out",
    "find_refusals",
    "find_said_changes",
    "list_checkpoints",
    "load_checkpoint",
    "prune",
    "read_manifest",
    "save_checkpoint",
    "spell_topology",
]
