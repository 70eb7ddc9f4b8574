from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fused_ops
from fused_ops import layer_norm_kernels

MAX_SPILLED_BYTES = {"bf16": 0, "fp32": 4}  # a thread; 4 in one of 36: forward at a width of 4,096 on sm_80
REGISTERS_OF_PROCESSOR = 65_536
LOAD_BYTES = 16  # the widest there is


def test_the_kernels_compile_for_sm_80_and_sm_90_without_spills() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(fused_ops.__file__).parents[1])
    command = [sys.executable, str(Path(__file__).with_name("compile_fused.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == (2 + 2 * 2 * 4) * 2 * 2  # kernels, with 4 widths of layer norm; types; architectures
    for report in reports:
        assert report["spilled_bytes"] <= MAX_SPILLED_BYTES[report["dtype"]], report
        assert report["load_bytes"] == LOAD_BYTES, report
        if "backward" in report["kernel"]:  # all programs of a processor run at once
            registers = 32 * layer_norm_kernels.WARPS_OF_PROCESSOR * report["registers"]
            assert registers <= REGISTERS_OF_PROCESSOR, report
