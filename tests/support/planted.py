"""Checkpoints that somebody made to run code, with the manifest and its checksum to fit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler

ROOT = Path(__file__).parents[2]


class Code:
    """Pickled, it is a call: whoever loads it makes a folder."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def make_codes(folder: Path) -> dict[str, tuple[Any, str]]:
    """Return objects that make the folder, and the name of what each calls."""
    hidden = LossScaler(scale=1.0)
    hidden.cur_scale = Code(exec, f"import os; os.mkdir({str(folder)!r})")
    return {
        "posix": (Code(os.mkdir, str(folder)), "posix.mkdir"),
        "builtin": (Code(exec, f"import os; os.mkdir({str(folder)!r})"), "exec"),
        "module": (Code(shutil.copytree, str(ROOT / "launch"), str(folder)), "shutil.copytree"),
        "in a type of DeepSpeed": (hidden, "exec"),
    }


def plant(checkpoint: Path, name: str, made: Path) -> Path:
    """Put code into a file whose name ends so, and make the manifest and its checksum fit; return the file."""
    path = max(checkpoint.glob(f"*{name}"))
    states = torch.load(path, weights_only=False) if path.suffix == ".pt" else {}
    torch.save({**states, "more": make_codes(made)["builtin"][0]}, path)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["files"][path.name] = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    text = json.dumps(manifest)
    (checkpoint / "manifest.json").write_text(text)
    (checkpoint / "manifest.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())
    return path
