from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from megalibi.errors import ConfigError
from megalibi.runtime.device import check_accelerator, describe_device

ON_THE_CPU = """
import os
from megalibi.runtime.device import set_up_device
from megalibi.runtime.ranks import find_place
print(set_up_device(find_place({})))
from deepspeed.accelerator import get_accelerator
import torch
print(get_accelerator().device_name(), torch.cuda.device_count(), repr(os.environ["CUDA_VISIBLE_DEVICES"]))
"""


def test_a_process_that_is_told_so_computes_on_the_cpu_wherever_it_is() -> None:
    """DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES for its ranks, on a CPU too."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "0"}
    command = [sys.executable, "-c", ON_THE_CPU]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["cpu", "cpu 0 ''"]


@pytest.mark.parametrize("told", ["cuda", "xpu"])
def test_an_accelerator_that_is_not_here_is_refused(told: str) -> None:
    message = f"DS_ACCELERATOR={told} in the environment: must be cpu or unset, since torch finds no GPU on "
    with pytest.raises(ConfigError, match=message):
        check_accelerator({"DS_ACCELERATOR": told})
    check_accelerator({"DS_ACCELERATOR": "cpu"})
    check_accelerator({})


def test_a_cpu_is_described_by_the_kind_of_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for processor, name in (("x86_64", "x86_64"), ("", "cpu")):  # some systems do not say
        monkeypatch.setattr(platform, "processor", lambda processor=processor: processor)
        assert describe_device(torch.device("cpu")) == name
