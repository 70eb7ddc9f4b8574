"""Shapes on the meta device, against what the back ends do on a CPU."""

from __future__ import annotations

import pytest
import torch

from alibi_attention import PackedDocuments, alibi_slopes, attention, backends, resolve_backend, split_qkv
from alibi_attention.backends import meta

HEADS, HEAD_DIM = 3, 8


def draw(length, device, dtype=torch.float32):
    return torch.empty(2, length, 3, HEADS, HEAD_DIM, device=device, dtype=dtype).normal_().requires_grad_()


def attend(qkv, split, **arguments):
    """Output of attention on parts of one tensor, with slopes unless the arguments say otherwise."""
    q, k, v = split(qkv)
    return attention(q, k, v, **{"alibi_slopes": alibi_slopes(HEADS).to(q.device), **arguments})


def unbind(qkv):
    return qkv.unbind(2)


def own_parts(qkv):
    return tuple(x.contiguous() for x in qkv.unbind(2))


@pytest.mark.parametrize("bias", ["alibi", "distance", "no"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_auto_takes_it_on_the_meta_device_and_it_takes_no_other(dtype, bias):
    assert resolve_backend("auto", "meta", dtype, 1000, dropout=True, documents=True, bias=bias) == "meta"
    with pytest.raises(RuntimeError, match="backend='meta' cannot run: meta: device cpu is not one of meta"):
        resolve_backend("meta", "cpu", dtype, 64, bias=bias)
    on_a_cpu = resolve_backend("auto", "cpu", torch.float32, 64, bias=bias)
    assert on_a_cpu != "meta"


def test_it_is_taken_by_name_and_is_not_listed_among_what_computes_attention():
    assert [backend.name for backend in backends() if "meta" in backend.devices] == ["unfused"]
    assert resolve_backend("meta", "meta", torch.float32, 64) == "meta"
    assert attend(draw(20, "meta"), unbind, backend="meta").device.type == "meta"


DISTANCE_BIAS = {"alibi_slopes": None, "distance_bias": True}
CALLS = {
    "alibi": {},
    "no bias": {"alibi_slopes": None},
    "distance bias": DISTANCE_BIAS,
    "dropout": {"dropout_p": 0.1},
    "documents": {"cu_seqlens": True},
}


def arguments_on(device, call, length):
    arguments = dict(CALLS[call])
    if "distance_bias" in arguments:
        arguments["distance_bias"] = torch.zeros(HEADS, length, device=device, requires_grad=True)
    if "cu_seqlens" in arguments:
        boundaries = torch.tensor([0, 7, 2 * length], dtype=torch.int32)
        arguments["cu_seqlens"] = PackedDocuments(boundaries, 2 * length, torch.device(device))
    return arguments


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("length", [20, 600])
@pytest.mark.parametrize("call", CALLS)
def test_outputs_and_gradients_have_the_form_of_those_on_a_cpu(call, length, device_type):
    found = []
    for device in ("cpu", "meta"):
        qkv = draw(length, device, torch.bfloat16)
        arguments = arguments_on(device, call, length)
        leaves = [qkv, *(x for x in arguments.values() if isinstance(x, torch.Tensor))]
        with meta.standing_for(device_type):
            output = attend(qkv, split_qkv, **arguments)
            gradients = torch.autograd.grad(output, leaves, torch.empty_like(output))
        found.append([(x.shape, x.dtype) for x in (output, *gradients)])
    assert found[0] == found[1]


def saved_bytes(output):
    """Bytes that the backward pass of a kernel keeps beside q, k and v."""
    *_, out, first, second = output.grad_fn.saved_tensors
    return sum(x.numel() * x.element_size() for x in (out, first, second))


def test_it_keeps_its_output_and_two_numbers_of_each_query_and_head():
    output = attend(draw(50, "meta", torch.bfloat16), unbind)
    assert saved_bytes(output) == 2 * 50 * HEADS * (2 * HEAD_DIM + 2 * 4)
    native = attend(draw(50, "cpu", torch.bfloat16), unbind, backend="native")
    saved = dict(zip(native.grad_fn.names, native.grad_fn.saved_tensors, strict=True))
    assert saved_bytes(output) == sum(
        saved[name].numel() * saved[name].element_size() for name in ("result_q", "largest", "inverse_sum")
    )


@pytest.mark.parametrize(
    ("device_type", "slopes", "split", "in_one"),
    [
        ("cuda", True, unbind, True),
        ("cpu", True, unbind, True),
        ("cpu", False, unbind, True),
        ("cuda", False, unbind, False),  # flash-attn comes first there, and writes three tensors
        ("cpu", True, own_parts, False),
    ],
)
def test_gradients_are_parts_of_one_tensor_where_our_kernels_make_them_so(device_type, slopes, split, in_one):
    parts = [x.detach().requires_grad_() for x in split(draw(20, "meta"))]
    with meta.standing_for(device_type):
        output = attend(parts, tuple, **({} if slopes else {"alibi_slopes": None}))
        gradients = torch.autograd.grad(output, parts, torch.empty_like(output))
    assert (len({x.untyped_storage()._cdata for x in gradients}) == 1) == in_one


def test_it_stands_for_cuda_unless_it_is_told_otherwise_and_again_afterwards():
    def gradient_type():
        """The type in which weights are written out for a learned bias: fp32 on CUDA, that of q on a CPU."""
        qkv, bias = draw(20, "meta", torch.bfloat16), torch.zeros(HEADS, 20, device="meta", requires_grad=True)
        output = attend(qkv, unbind, alibi_slopes=None, distance_bias=bias)
        assert output.dtype == torch.bfloat16
        return output.grad_fn.next_functions[0][0].name()

    on_cuda = gradient_type()
    with meta.standing_for("cpu"):
        on_cpu = gradient_type()
        with meta.standing_for("cuda"):
            assert gradient_type() == on_cuda
        assert gradient_type() == on_cpu
    assert gradient_type() == on_cuda != on_cpu
    with pytest.raises(ValueError, match="device_type='mps': must be cpu or cuda"), meta.standing_for("mps"):
        pass
