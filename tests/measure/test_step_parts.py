"""The part of a step that a kernel belongs to."""

from __future__ import annotations

import pytest

from megalibi.measure.step_parts import (
    ACCUMULATION,
    ATTENTION,
    BACKWARD_RANGE,
    COMMUNICATION,
    CROSS_ENTROPY,
    FORWARD_RANGE,
    GELU,
    LAYER_NORM,
    MATMUL,
    OPTIMIZER,
    OTHER,
    RESIDUAL,
    STEP_RANGE,
    find_part,
)

NODE = "autograd::engine::evaluate_function: "
ADD = "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16> >"
COPY = "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>"
CASES = [
    # What an H200 ran, by its name alone.
    (MATMUL, "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NTN", []),
    (MATMUL, "sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", []),
    (ATTENTION, "key_gradient_kernel", []),
    (ATTENTION, "forward_kernel", []),
    (ATTENTION, "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t> >", []),
    (LAYER_NORM, "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<c10::BFloat16>", []),
    (GELU, "void at::native::vectorized_elementwise_kernel<8, at::native::GeluBackwardCUDAKernelImpl>", []),
    (OPTIMIZER, "void at::native::multi_tensor_apply_kernel<at::native::FusedOptimizerTensorListMetadata<4> >", []),
    (COMMUNICATION, "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", []),
    (OTHER, ADD, []),
    # The same kernel by what was running on the host.
    (RESIDUAL, ADD, ["aten::add", FORWARD_RANGE]),
    (RESIDUAL, ADD, ["aten::add", f"{NODE}NativeLayerNormBackward0"]),
    (ACCUMULATION, ADD, ["aten::add_", f"{NODE}torch::autograd::AccumulateGrad"]),
    (ACCUMULATION, COPY, ["aten::copy_", BACKWARD_RANGE]),
    (CROSS_ENTROPY, ADD, ["aten::add", "_VocabParallelCrossEntropy", FORWARD_RANGE]),
    (CROSS_ENTROPY, COPY, ["aten::copy_", f"{NODE}_VocabParallelCrossEntropyBackward"]),
    (OPTIMIZER, COPY, ["aten::copy_", "aten::to", STEP_RANGE]),
    (OPTIMIZER, ADD, ["aten::add_", "Optimizer.step#AdamW.step", STEP_RANGE]),
    (ATTENTION, "forward_kernel", ["_Attention", FORWARD_RANGE]),
    (LAYER_NORM, "layer_norm_forward_kernel", []),
    (CROSS_ENTROPY, "cross_entropy_gradient_kernel", []),
    (ATTENTION, COPY, ["aten::contiguous", "_Attention", FORWARD_RANGE]),
    (OTHER, COPY, ["aten::cat", "aten::stack", "UnbindBackward0", f"{NODE}UnbindBackward0", BACKWARD_RANGE]),
    # A CPU's operations.
    (MATMUL, "aten::mm", ["aten::linear", FORWARD_RANGE]),
    (RESIDUAL, "aten::add", [FORWARD_RANGE]),
    (ACCUMULATION, "torch::autograd::AccumulateGrad", [BACKWARD_RANGE]),
    (GELU, "aten::gelu", [FORWARD_RANGE]),
]  # fmt: skip


@pytest.mark.parametrize(("part", "name", "path"), CASES)
def test_a_kernel_belongs_to_a_part(part: str, name: str, path: list[str]) -> None:
    assert find_part(name, path) == part
