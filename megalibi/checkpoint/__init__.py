"""Checkpoints that survive a crash at any moment."""

from megalibi.checkpoint.lock import RunLock
from megalibi.checkpoint.manifest import (
    CHECKPOINTS,
    LATEST,
    Manifest,
    find_checkpoint,
    find_damage,
    get_checkpoint,
    list_checkpoints,
    prune,
    read_manifest,
)
from megalibi.checkpoint.resumable import check_resumable, describe_changes
from megalibi.checkpoint.store import load_checkpoint, save_checkpoint
from megalibi.checkpoint.weights import load_full_weights, load_model

__all__ = [
    "CHECKPOINTS",
    "LATEST",
    "Manifest",
    "RunLock",
    "check_resumable",
    "describe_changes",
    "find_checkpoint",
    "find_damage",
    "get_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_full_weights",
    "load_model",
    "prune",
    "read_manifest",
    "save_checkpoint",
]
