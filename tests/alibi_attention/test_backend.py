from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from alibi_attention.backend import Call, Capability

CAPABILITY = Capability(
    name="sample",
    usable=True,
    reason="",
    exactness="fp32",
    devices=("cuda",),
    dtypes=(torch.bfloat16,),
    dropout=False,
    cu_seqlens="native",
    gap=False,
    max_head_dim=128,
)


def test_a_call_within_the_limits_is_not_refused():
    assert CAPABILITY.find_refusal(Call("cuda", torch.bfloat16, 128)) is None


@pytest.mark.parametrize(
    ("call", "refusal"),
    [
        (("cpu", torch.bfloat16, 64, False), "device cpu is not one of cuda"),
        (("cuda", torch.float32, 64, False), "dtype torch.float32 is not one of torch.bfloat16"),
        (("cuda", torch.bfloat16, 256, False), "head_dim 256 is more than 128"),
        (("cuda", torch.bfloat16, 64, True), "it has no attention dropout"),
        (("cuda", torch.bfloat16, 64, False, True, True), "it cannot place queries beyond the last key"),
    ],
)
def test_a_call_past_a_limit_is_refused_with_the_reason(call, refusal):
    assert CAPABILITY.find_refusal(Call(*call)) == refusal


def test_an_unusable_back_end_gives_its_own_reason():
    missing = replace(CAPABILITY, usable=False, reason="flash-attn is not installed")
    assert missing.find_refusal(Call("cuda", torch.bfloat16, 64)) == "flash-attn is not installed"
