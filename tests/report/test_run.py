from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megalibi.errors import CheckpointError, ConfigError, FileError, UserError
from megalibi.metrics.records import StepRecord
from megalibi.report.run import read_run

MakeStep = Callable[..., StepRecord]


def test_a_folder_becomes_a_run(write_run: Callable[..., Path]) -> None:
    run = read_run(write_run("quickstart"))
    assert run.name == "quickstart"
    assert run.config["parallel"] == {"tensor_parallel_size": 2}
    assert (len(run.metrics.steps), len(run.metrics.validations)) == (40, 2)
    (evaluation,) = run.evaluations
    assert [result.length for result in evaluation.results] == [64, 128]
    assert evaluation.train_seq_length == 64


def test_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds neither config\.yaml nor metrics\.jsonl"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "kind"),
    [
        ("config.yaml", "model: [1", ConfigError),
        ("config.yaml", "- a\n- b\n", CheckpointError),
        ("run_info.json", "{", FileError),
        ("evaluation.json", "[]", FileError),
        ("evaluation-sliding.json", '{"step": 1, "results": []}', CheckpointError),
        (
            "evaluation.json",
            '{"step": 1, "train_seq_length": 8, "protocol": "sliding", "results": [{"length": 8}]}',
            CheckpointError,
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(
    write_run: Callable[..., Path], file: str, content: str, kind: type[UserError]
) -> None:
    folder = write_run("broken")
    (folder / file).write_text(content)
    with pytest.raises(kind, match=file) as raised:
        read_run(folder)
    assert "\n" not in str(raised.value)
