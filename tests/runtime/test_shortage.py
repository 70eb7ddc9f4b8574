from __future__ import annotations

import errno

import numpy as np
import pytest
import torch

from megalibi.errors import FileError
from megalibi.runtime.shortage import Shortage, find_shortage

CUDA = (
    "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 3.12 GiB is "
    "free. Including non-PyTorch memory, this process has 75.97 GiB memory in use."
)


def raised(work) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - whatever the library raises
        work()
    return caught.value


def test_what_torch_and_numpy_raise_on_this_host_is_known_with_what_was_asked_for() -> None:
    found = find_shortage(raised(lambda: torch.empty(2**50, dtype=torch.uint8)))
    assert found is not None
    assert (found.kind, found.asked_bytes) == ("host", 2**50)
    assert "can't allocate memory" in found.said
    found = find_shortage(raised(lambda: np.empty(2**50, np.uint8)))
    assert found is not None
    assert (found.kind, found.asked_bytes) == ("host", 2**50)
    found = find_shortage(raised(lambda: torch.empty(2**62, dtype=torch.float32)))
    assert found is not None
    assert (found.kind, found.asked_bytes) == ("host", None)
    assert find_shortage(MemoryError()) == Shortage(kind="host", asked_bytes=None, said="MemoryError")
    assert find_shortage(OSError(errno.ENOMEM, "Cannot allocate memory")) is not None


def test_a_gpus_shortage_is_known_by_its_type_and_its_words() -> None:
    """The words alone: no GPU ran out of memory here."""
    found = find_shortage(torch.OutOfMemoryError(CUDA))
    assert found == Shortage(kind="GPU", asked_bytes=int(20.5 * 2**30), said=CUDA[:200])
    assert find_shortage(RuntimeError("CUDA error: out of memory")) is not None


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.ENOSPC, "No space left on device"),
        FileError("checkpoint not written, the one before it stays: x: can't allocate memory; checkpoint.asynchronous"),
    ],
)
def test_other_errors_are_not_about_memory(error: Exception) -> None:
    assert find_shortage(error) is None
