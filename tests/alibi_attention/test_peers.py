from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from alibi_attention import alibi_slopes, attention
from alibi_attention.peers import PEERS, build_plain

BOUNDS = {torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # as in test_every_backend.py
# What they do with the bias is theirs: Bloom rounds bias and weights to 16 bits, MPT the weights.
BOUND_OF_16_BIT_BIAS = {"bloom": 0.05, "mpt": 0.01}
BY_NAME = {peer.name: peer for peer in PEERS}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            peer.name,
            dtype,
            id=f"{peer.name}-{str(dtype).removeprefix('torch.')}",
            # flash-attn runs in an interpreter here (flash_attn_on_cpu.py); transformers is no dependency of the tests.
            marks=pytest.mark.skipif(
                peer.package == "transformers" and not find_spec("transformers"), reason="transformers is not installed"
            ),
        )
        for peer in PEERS
        for dtype in peer.dtypes
    ],
)
def test_a_peer_computes_alibi(make_inputs, forward_backward, relative_errors, name, dtype):
    inputs = make_inputs(2, 65, 8, 32, dtype=dtype)
    slopes = alibi_slopes(8)
    biased = None if name == "flash_attn" else slopes

    def attend_ref(q, k, v):
        return attention(q, k, v, alibi_slopes=biased, backend="reference")

    exact = forward_backward(attend_ref, inputs, torch.float64)
    attend = BY_NAME[name].build(inputs[0], slopes)
    if name == "flex":  # it has no backward pass on a CPU
        results, exact = [attend(*inputs[:3])], exact[:1]
    else:
        results = forward_backward(attend, inputs)
    bound = BOUNDS[dtype] if dtype == torch.float32 else BOUND_OF_16_BIT_BIAS.get(name, BOUNDS[dtype])
    assert max(relative_errors(results, exact)) < bound


def test_plain_attention_has_no_bias(make_inputs, forward_backward, relative_errors):
    inputs = make_inputs(2, 65, 8, 32)
    results = forward_backward(build_plain(inputs[0], alibi_slopes(8)), inputs)
    exact = forward_backward(
        lambda *qkv: attention(*qkv, alibi_slopes=None, backend="reference"), inputs, torch.float64
    )
    assert max(relative_errors(results, exact)) < BOUNDS[torch.float32]


def test_a_peer_that_cannot_run_says_why():
    assert BY_NAME["flex"].find_refusal("cpu", torch.float32) == "it does not run on cpu"
    assert BY_NAME["flash_attn"].find_refusal("cuda", torch.float32) == "it is not measured in torch.float32"
    assert BY_NAME["sdpa_dense"].find_refusal("cuda", torch.float32) is None
    if not find_spec("transformers"):
        assert BY_NAME["bloom"].find_refusal("cpu", torch.float32) == "transformers is not installed"
