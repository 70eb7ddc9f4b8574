from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path

import pytest

from tests.support.jobs import Job, write_job


def error_of(job: Job) -> str:
    """Return the one line that a job was refused with."""
    assert set(job.wait()) == {2}, job.output
    (line,) = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in job.output
    return line


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ("optimizer.learning_rate=0.002", "optimizer.learning_rate is 0.003 on rank 0 (host {host}) and 0.002 on"),
        ("train.seed=5", "train.seed is 1234 on rank 0 (host {host}) and 5 on rank 1"),
        ("train.steps=7", "train.steps is 6 on rank 0 (host {host}) and 7 on rank 1"),
        ("parallel.tensor_parallel_size=2", "parallel.tensor_parallel_size is 1 on rank 0 (host {host}) and 2 on"),
    ],
)  # fmt: skip
def test_ranks_that_were_told_other_things_do_not_start(tmp_path: Path, other: str, expected: str) -> None:
    config = write_job(tmp_path)
    line = error_of(Job(config, world_size=2, rank_overrides=[[], [other]]))
    assert expected.format(host=socket.gethostname()) in line
    assert f"(host {socket.gethostname()}): start all ranks with the same configuration, data and code" in line
    assert not (tmp_path / "run").exists()


def test_ranks_whose_data_differs_behind_one_name_do_not_start(tmp_path: Path) -> None:
    """As on two hosts, each with a disk of its own."""
    config = write_job(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for suffix in (".bin", ".idx"):
            shutil.copy(tmp_path / f"tokens{suffix}", tmp_path / name)
    content = bytearray((tmp_path / "b" / "tokens.bin").read_bytes())
    content[10_000] ^= 1
    (tmp_path / "b" / "tokens.bin").write_bytes(content)
    folders = [[f"data.train={tmp_path}/{name}/tokens"] for name in ("a", "b")]
    line = error_of(Job(config, world_size=2, rank_overrides=folders))
    found = re.findall(
        r"of weight 1.0, 20,000 tokens in 21 documents, sha256 of .idx (\w{12}), of .bin (\w{12}) on rank \d", line
    )
    assert len(found) == 2
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]

    shutil.copy(tmp_path / "a" / "tokens.bin", tmp_path / "b" / "tokens.bin")  # the same, elsewhere
    Job(config, world_size=2, rank_overrides=folders).succeed()
