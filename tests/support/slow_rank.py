"""launch/pretrain.py with a rank 1 that is busy with something else for a while at the start of each forward pass.

python tests/support/slow_rank.py SECONDS --config FILE
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from megalibi.model import GPT

SCRIPT = Path(__file__).parents[2] / "launch" / "pretrain.py"


def burn(module: nn.Module, _inputs: object) -> None:
    if isinstance(module, GPT) and os.environ["RANK"] == "1":
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass


if __name__ == "__main__":
    seconds = float(sys.argv.pop(1))
    register_module_forward_pre_hook(burn)
    runpy.run_path(str(SCRIPT), run_name="__main__")
