"""A rank that may take no more memory, really: the system refuses it."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from tests.support.faults import refuse_memory
from tests.support.jobs import Job, write_job

ROOM_BYTES = 200_000_000
"""What the process may take beyond what it has as it starts: the imports and the engine, and not a step."""


def test_memory_that_runs_out_in_a_step_is_one_line_with_the_plan_and_what_lowers_it(tmp_path: Path) -> None:
    config = write_job(
        tmp_path,
        model={"hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64},
        train={"global_batch_size": 64, "micro_batch_size": 64, "precision": "fp32"},
        data={"seq_length": 2_048, "train": str(tmp_path / "tokens")},
    )
    job = Job(config)
    refuse_memory(job.processes[0].pid, ROOM_BYTES)
    assert job.wait() == [2], job.output
    line = job.read_log(0).splitlines()[-1]
    assert "Traceback" not in job.output
    size = r"\d+\.\d [MG]B"
    assert re.match(
        rf"error: not enough memory on {socket.gethostname()}, the host's: {size} more were asked for; a rank of this "
        rf"run is planned with {size} at the peak of a step \(weights .*, activations {size}, .*\), beside Python and "
        rf"its libraries; less is planned with train\.micro_batch_size=32 \({size}\), model\.recompute=full "
        rf"\({size}\)$",
        line,
    ), line
