"""Checkpoints that survive a crash at any moment."""

from megalibi.checkpoint.manifest import Manifest, find_checkpoint, find_damage, list_checkpoints, read_manifest
from megalibi.checkpoint.store import CheckpointError, check_resumable, load_checkpoint, save_checkpoint

__all__ = [
    "CheckpointError",
    "Manifest",
    "check_resumable",
    "find_checkpoint",
    "find_damage",
    "list_checkpoints",
    "load_checkpoint",
    "read_manifest",
    "save_checkpoint",
]
