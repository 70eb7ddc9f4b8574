from __future__ import annotations

import importlib
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch

from alibi_attention import alibi_slopes, attention
from alibi_attention.bench.peers import PEERS, build_plain, find_forget_gate

BOUNDS = {torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # as in every_backend/support.py
# What they do with the bias is theirs: Bloom rounds bias and weights to 16 bits, MPT the weights.
BOUND_OF_16_BIT_BIAS = {"bloom": 0.05, "mpt": 0.01}
OPTIONAL = ("transformers", "forgetting_transformer")
BY_NAME = {peer.name: peer for peer in PEERS}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            peer.name,
            dtype,
            id=f"{peer.name}-{str(dtype).removeprefix('torch.')}",
            # flash-attn runs in an interpreter here (flash_attn_on_cpu.py); these are no dependencies of the tests.
            marks=pytest.mark.skipif(
                peer.package in OPTIONAL and not find_spec(peer.package), reason=f"{peer.package} is not installed"
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
    if name in ("flex", "flex_flash"):  # it has no backward pass on a CPU
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
    assert BY_NAME["cudnn_folded"].find_refusal("cpu", torch.bfloat16) == "it does not run on cpu"
    if not torch.backends.cudnn.is_available():
        assert BY_NAME["cudnn_folded"].find_refusal("cuda", torch.bfloat16) == "this torch has no cuDNN"
    # It is a part of a package that may be there without it, and the package may be missing too.
    refusal = BY_NAME["flex_flash"].find_refusal("cuda", torch.bfloat16)
    assert refusal in (None, "flash_attn.cute is not installed") or refusal.endswith("no choice of back end")
    if not find_spec("forgetting_transformer"):
        refusal = BY_NAME["forgetting"].find_refusal("cuda", torch.bfloat16)
        assert refusal == "forgetting_transformer is not installed"
    if not find_spec("transformers"):
        assert BY_NAME["bloom"].find_refusal("cpu", torch.float32) == "transformers is not installed"


def test_a_kernel_without_pruning_and_a_package_that_cannot_be_imported_are_refused(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "forgetting_transformer", raising=False)
    package = tmp_path / "forgetting_transformer.py"
    reasons = []
    for source in ("import no_such_package", "def forgetting_attention(q, k, v, log_fgate): ..."):
        package.write_text(source + "\n")
        importlib.invalidate_caches()
        reasons.append(BY_NAME["forgetting"].find_refusal("cuda", torch.bfloat16))
        sys.modules.pop("forgetting_transformer", None)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    assert reasons == [
        "forgetting_transformer cannot be used: No module named 'no_such_package'",
        "this forgetting_transformer does not prune",
    ]


BAD_BUILD = "flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda"


def test_a_build_for_another_torch_is_a_reason(monkeypatch, tmp_path):
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text(f"raise ImportError({BAD_BUILD!r})\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "flash_attn_alibi", "flex_flash"):
        refusal = BY_NAME[name].find_refusal("cuda", torch.bfloat16)
        assert refusal == f"{BY_NAME[name].package} cannot be used: {BAD_BUILD}"


def test_alibi_is_a_constant_forget_gate_and_pruning_gives_away_what_the_horizon_does(make_inputs):
    """Their kernel needs a GPU; what it is given is held against the equation."""
    q, k, v, _ = (x.double() for x in make_inputs(2, 400, 2, 32))
    slopes = torch.tensor([1.0, 0.5])
    exact = attention(q, k, v, alibi_slopes=slopes, backend="reference")
    log_gate_BSH, threshold_BH = find_forget_gate(q, k, slopes)
    decay_BHS = log_gate_BSH.double().transpose(1, 2).cumsum(-1)
    decay_BHQT = decay_BHS[..., None] - decay_BHS[..., None, :]
    is_pruned = (decay_BHQT < threshold_BH[..., None, None]).tril()
    assert is_pruned.any()
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * 32**-0.5 + decay_BHQT
    is_future = torch.ones(400, 400, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(is_future | is_pruned, -torch.inf).softmax(-1)
    output = torch.einsum("bhij,bjhk->bihk", weights, v)
    assert (output - exact).abs().max() <= 2 * 2.0**-24 * v.abs().max()
