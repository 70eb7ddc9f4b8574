"""What a run that has diverged leaves in its folder."""

from __future__ import annotations

import json
from pathlib import Path

from megalibi.config import Config


def write_divergence(config: Config, step: int) -> None:
    """Write diverged.json into the folder of a run, which is made where there is none."""
    folder = Path(config.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "diverged.json").write_text(json.dumps({"step": step, "message": f"step {step} has loss nan"}))
