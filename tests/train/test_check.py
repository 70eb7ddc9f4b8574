from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from megalibi.errors import ConfigError, DataError, FileError
from megalibi.train.check import check_run, check_run_folder
from tests.support.checkpoints import write_checkpoint_without_tensors
from tests.support.runs import make_config, write_tokens


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


def test_a_token_file_that_changed_or_lost_a_byte_is_found_before_a_resume(tmp_path: Path) -> None:
    """Whatever its time of modification says."""
    prefix = write_tokens(tmp_path, num_tokens=10_000)
    config = make_config(prefix, train={"output_dir": str(tmp_path / "run")})
    tokens = Path(f"{prefix}.bin")
    content, stat = tokens.read_bytes(), tokens.stat()
    write_checkpoint_without_tensors(tmp_path / "run" / "checkpoints", config)
    check_run(config, 1)

    def write(changed: bytes) -> None:
        tokens.write_bytes(changed)
        os.utime(tokens, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    middle = len(content) // 2
    write(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(ConfigError, match=rf"^data.train={prefix} \(10,000 .*: must be the text that the checkpoint "):
        check_run(config, 1)
    write(content[:-1])
    with pytest.raises(DataError, match=r"tokens\.bin: truncated, 19999 bytes of the 20000 that "):
        check_run(config, 1)
    write(content)
    check_run(config, 1)
