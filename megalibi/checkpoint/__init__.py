"""Checkpoints that survive a crash at any moment."""

from megalibi.checkpoint.manifest import (
    CHECKPOINTS,
    LATEST,
    Manifest,
    find_checkpoint,
    find_damage,
    get_checkpoint,
    list_checkpoints,
    read_manifest,
)
from megalibi.checkpoint.resumable import check_resumable
from megalibi.checkpoint.store import CheckpointError, load_checkpoint, save_checkpoint
from megalibi.checkpoint.weights import load_full_weights, load_model

__all__ = [
    "CHECKPOINTS",
    "LATEST",
    "CheckpointError",
    "Manifest",
    "check_resumable",
    "find_checkpoint",
    "find_damage",
    "get_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_full_weights",
    "load_model",
    "read_manifest",
    "save_checkpoint",
]
