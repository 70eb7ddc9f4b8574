"""Dropout of attention weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from alibi_attention import attention
from tests.alibi_attention.every_backend.support import (
    attend_ref,
    every_backend_and_dtype,
    pick,
    skipping_what_its_build_lacks,
    slopes_of,
    with_and_without_slopes,
)
from tests.support.device import DEVICE

gpu = pytest.mark.gpu  # named in each file: by it a GPU's run finds them

DROPOUT_ROUNDING = 1e-5  # of a single attention weight, beside the rounding of its own type


@gpu
@with_and_without_slopes
@every_backend_and_dtype
def test_dropout_keeps_exact_weights_and_drops_the_rest(make_inputs, backend, dtype, with_slopes):
    dropout_p, num_heads = 0.25, pick(backend, 64, 8)
    slopes = slopes_of(num_heads) if with_slopes else None
    q, k, _, _ = make_inputs(1, 64, num_heads, 64, dtype=dtype)
    identity = torch.eye(64, dtype=dtype, device=DEVICE)[None, :, None].expand_as(k)
    attend = partial(attention, alibi_slopes=slopes, dropout_p=dropout_p, backend=backend.name)
    if not backend.dropout:
        with pytest.raises(RuntimeError, match="it has no attention dropout"):
            attend(q, k, identity)
        return
    with skipping_what_its_build_lacks():
        kept = attend(q, k, identity).double() * (1 - dropout_p)
    weights = attend_ref(q.double(), k.double(), identity.double(), alibi_slopes=slopes)
    is_kept, visible = kept != 0, weights > torch.finfo(dtype).tiny  # what is less than tiny may be 0 undropped
    rounding = 2 * torch.finfo(dtype).eps + DROPOUT_ROUNDING
    if backend.name == "unfused":  # and half a rounding step of a score below 8
        rounding += 4 * torch.finfo(dtype).eps / 2
    torch.testing.assert_close(kept[is_kept], weights[is_kept], rtol=rounding, atol=DROPOUT_ROUNDING)
    assert ((is_kept & visible).sum() / visible.sum()).item() == pytest.approx(1 - dropout_p, abs=0.01)
