from __future__ import annotations

import re
from pathlib import Path

import pytest

from megalibi.errors import FileError
from megalibi.train.check import check_run_folder


def test_what_a_run_writes_can_be_in_its_way(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    check_run_folder(tmp_path)
    for name, is_folder in (
        ("metrics.jsonl", True),
        ("config.yaml", True),
        ("run_info.json", True),
        ("tensorboard", False),
        ("checkpoints", False),
    ):
        taken = tmp_path / name
        taken.mkdir() if is_folder else taken.touch()
        what = "must be a file, and is a folder" if is_folder else "is no folder"
        message = f"train.output_dir={tmp_path} cannot be written: {taken} {what}"
        with pytest.raises(FileError, match=f"^{re.escape(message)}$"):
            check_run_folder(tmp_path)
        taken.rmdir() if is_folder else taken.unlink()
