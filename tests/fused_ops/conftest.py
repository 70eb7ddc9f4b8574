from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fused_ops import fusing


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fused() -> Iterator[None]:
    """The kernels on the GPU, or on the CPU in Triton's interpreter."""
    with fusing(True):
        yield
