from __future__ import annotations

import pytest

from megalibi.errors import ConfigError
from megalibi.plan.gpus import GIB, GPUS, get_gpu


def test_gpus_are_found_by_name_and_have_a_source() -> None:
    assert get_gpu("h100").memory_bytes == 80 * GIB
    assert all(gpu.source and gpu.usable_bytes < gpu.memory_bytes for gpu in GPUS.values())
    with pytest.raises(ConfigError, match=r"--gpu=A100: did you mean A100-40GB or A100-80GB\? It must be one of V100"):
        get_gpu("A100")


def test_every_gpu_has_its_bandwidths() -> None:
    for gpu in GPUS.values():
        intensity = gpu.peak_flops_per_second / gpu.memory_bytes_per_second
        assert 100 < intensity < 500, gpu.name  # FLOP for a byte: a slip of a power of ten shows
        assert gpu.link_bytes_per_second < gpu.memory_bytes_per_second / 4, gpu.name
