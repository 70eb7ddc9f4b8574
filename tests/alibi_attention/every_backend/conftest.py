from __future__ import annotations

from functools import partial

import pytest
import torch

from alibi_attention import attention
from tests.alibi_attention.every_backend.support import (
    BOUNDS,
    attend_ref,
    skipping_what_its_build_lacks,
)


@pytest.fixture
def check(forward_backward, relative_errors):
    """Hold output and gradients of a back end to the bound of their type, against the equation in fp64."""

    def check(backend, inputs, **arguments):
        with skipping_what_its_build_lacks():
            results = forward_backward(partial(attention, backend=backend.name, **arguments), inputs)
        exact = forward_backward(partial(attend_ref, **arguments), inputs, torch.float64)
        assert max(relative_errors(results, exact)) < BOUNDS[inputs[0].dtype]

    return check
