"""Others' attention as functions of q, k and v, to be timed beside ours; none of it is used by ``attention``.

What depends on no query, a bias or a mask, is built beforehand and is not timed.

Shape suffixes: B batch, S sequence, H heads, K head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from inspect import signature

import torch
import torch.nn.functional as F

from alibi_attention.backends.folded.extra_dims import attend_with_extra_dims

_BIAS_ROWS = 64
_PRUNED_SHARE = 2.0**-24
"""Of a row, as our horizon leaves out."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Peer:
    """Somebody else's attention."""

    name: str
    """Its name in a table."""
    what: str
    """What exactly is timed, in words."""
    build: Callable[[torch.Tensor, torch.Tensor], Attend]
    """Returns the function that is timed, for a q of the right shape, type and device, and the slopes [H]."""
    package: str = ""
    """Package or module that it needs besides torch, or empty."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Device types it runs on."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    """Types of q, k and v."""
    bytes_per_score: int = 0
    """About the most bytes that it holds for each of the B x H x S x S scores."""
    find_lack: Callable[[], str | None] = lambda: None
    """Returns why the installed package will not do, or None if it will; called only if the package is there."""

    def find_refusal(self, device_type: str, dtype: torch.dtype) -> str | None:
        """Return why it cannot run here, or None."""
        if device_type not in self.devices:
            return f"it does not run on {device_type}"
        if dtype not in self.dtypes:
            return f"it is not measured in {dtype}"
        try:
            if self.package and not _is_installed(self.package):
                return f"{self.package} is not installed"
            return self.find_lack()
        except Exception as error:  # an import may raise anything: a build for another torch lacks a symbol
            return f"{self.package or 'torch'} cannot be used: {' '.join(str(error).split())}"


def _is_installed(module: str) -> bool:
    """Return whether a module is there; for a part of a package, the package is imported, and may fail."""
    package, _, part = module.partition(".")
    if find_spec(package) is None:
        return False
    return not part or find_spec(module) is not None


def build_plain(q_BSHK: torch.Tensor, slopes_H: torch.Tensor) -> Attend:
    """Causal attention without a bias: what ALiBi would cost if it were free."""
    return _sdpa(partial(F.scaled_dot_product_attention, is_causal=True))


def _build_dense(q_BSHK: torch.Tensor, slopes_H: torch.Tensor) -> Attend:
    return _sdpa(partial(F.scaled_dot_product_attention, attn_mask=_dense_bias(q_BSHK, slopes_H, q_BSHK.dtype)))


def _build_dense_fp32(q_BSHK: torch.Tensor, slopes_H: torch.Tensor) -> Attend:
    attend = partial(F.scaled_dot_product_attention, attn_mask=_dense_bias(q_BSHK, slopes_H, torch.float32))
    if q_BSHK.device.type == "cpu":
        return _sdpa(attend)
    # The CUDA kernels want the mask in the type of q: an exact bias has to be fp32, and so the rest.
    return lambda q, k, v: _sdpa(attend)(q.float(), k.float(), v.float()).to(q.dtype)


def _build_flex(q_BSHK: torch.Tensor, slopes_H: torch.Tensor, kernel_options: dict[str, str] | None = None) -> Attend:
    flex = import_module("torch.nn.attention.flex_attention")
    seq_length, device = q_BSHK.shape[1], q_BSHK.device

    def bias(score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return score - slopes_H[h] * (i - j)

    def is_past(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return i >= j

    past = flex.create_block_mask(is_past, None, None, seq_length, seq_length, device=str(device))
    # Its fused kernel exists only compiled; on a CPU it is run as it is written, to be tested.
    attend = torch.compile(flex.flex_attention) if device.type == "cuda" else flex.flex_attention
    return _sdpa(partial(attend, score_mod=bias, block_mask=past, kernel_options=kernel_options))


def _find_lack_of_flex_backends() -> str | None:
    options = getattr(import_module("torch.nn.attention.flex_attention"), "FlexKernelOptions", None)
    if "BACKEND" in getattr(options, "__annotations__", {}):
        return None
    return f"torch {torch.__version__} offers flex_attention no choice of back end"


def _build_cudnn_folded(q_BSHK: torch.Tensor, slopes_H: torch.Tensor) -> Attend:
    attention = import_module("torch.nn.attention")
    # On a CPU, to be tested, the same inputs go through the equation as PyTorch writes it.
    kernel = attention.SDPBackend.CUDNN_ATTENTION if q_BSHK.device.type == "cuda" else attention.SDPBackend.MATH

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with attention.sdpa_kernel(kernel):
            return attend_with_extra_dims(q, k, v, slopes_H, q.shape[-1] ** -0.5, query_offset=0)

    return attend


def _find_lack_of_cudnn() -> str | None:
    return None if torch.backends.cudnn.is_available() else "this torch has no cuDNN"


def find_forget_gate(
    q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, slopes_H: torch.Tensor, pruned_share: float = _PRUNED_SHARE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ALiBi as the logarithm of forget gates [B, S, H], and the decay [B, H] past which they are pruned.

    The decay is their bound (arXiv:2504.06949, section 3) for a share of a row, by default what our horizon leaves out.
    """
    batch, seq_length, _, head_dim = q_BSHK.shape
    q_norm_BH, k_norm_BH = (torch.linalg.vector_norm(x.detach().float(), dim=-1).amax(1) for x in (q_BSHK, k_BSHK))
    largest_BH = q_norm_BH * k_norm_BH * head_dim**-0.5
    return (-slopes_H).expand(batch, seq_length, -1), math.log(pruned_share / seq_length) - 2 * largest_BH


def _build_forgetting(q_BSHK: torch.Tensor, slopes_H: torch.Tensor) -> Attend:
    attend_forgetting = import_module("forgetting_transformer").forgetting_attention

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        log_gate_BSH, threshold_BH = find_forget_gate(q, k, slopes_H)
        output: torch.Tensor = attend_forgetting(q, k, v, log_gate_BSH, adaptive_threshold=threshold_BH)
        return output

    return attend


def _find_lack_of_pruning() -> str | None:
    attend = import_module("forgetting_transformer").forgetting_attention
    prunes = "adaptive_threshold" in signature(attend).parameters
    return None if prunes else "this forgetting_transformer does not prune"


def _find_lack_of_flash() -> str | None:
    import_module("flash_attn").flash_attn_func  # noqa: B018  a build for another torch fails here
    return None


def _build_flash(q_BSHK: torch.Tensor, slopes_H: torch.Tensor) -> Attend:
    return partial(import_module("flash_attn").flash_attn_func, causal=True)


def _build_flash_alibi(q_BSHK: torch.Tensor, slopes_H: torch.Tensor) -> Attend:
    slopes_BH = slopes_H.expand(len(q_BSHK), -1)
    return partial(import_module("flash_attn").flash_attn_func, causal=True, alibi_slopes=slopes_BH)


def _build_bloom(q_BSHK: torch.Tensor, slopes_H: torch.Tensor) -> Attend:
    batch, seq_length, num_heads, head_dim = q_BSHK.shape
    bloom = import_module("transformers.models.bloom.modeling_bloom")
    size = {"hidden_size": num_heads * head_dim, "n_head": num_heads}
    module = bloom.BloomAttention(bloom.BloomConfig(**size, hidden_dropout=0.0, attention_dropout=0.0), layer_idx=0)
    module.query_key_value = module.dense = torch.nn.Identity()
    ones = torch.ones(batch, seq_length, device=q_BSHK.device)
    bias = bloom.build_alibi_tensor(ones, num_heads, q_BSHK.dtype)
    mask = torch.zeros(1, 1, seq_length, seq_length, dtype=q_BSHK.dtype, device=q_BSHK.device)
    mask.masked_fill_(_is_future(q_BSHK), torch.finfo(q_BSHK.dtype).min)
    residual = q_BSHK.new_zeros(())

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        fused = torch.stack((q, k, v), dim=3).flatten(2)  # [B, S, H * 3 * K]
        output: torch.Tensor = module(fused, residual, bias, mask)[0]
        return output.unflatten(-1, (num_heads, head_dim))

    return attend


def _build_mpt(q_BSHK: torch.Tensor, slopes_H: torch.Tensor) -> Attend:
    _, seq_length, num_heads, head_dim = q_BSHK.shape
    mpt = import_module("transformers.models.mpt.modeling_mpt")
    module = mpt.MptAttention(mpt.MptConfig(d_model=num_heads * head_dim, n_heads=num_heads), layer_idx=0)
    module.Wqkv = module.out_proj = torch.nn.Identity()
    bias = mpt.build_mpt_alibi_tensor(num_heads, seq_length, device=q_BSHK.device)
    mask = _is_future(q_BSHK)[None, None]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mixed = torch.cat([x.flatten(2) for x in (q, k, v)], dim=2)
        output: torch.Tensor = module(mixed, bias, attention_mask=mask)[0]
        return output.unflatten(-1, (num_heads, head_dim)).to(q.dtype)

    return attend


def _sdpa(attend: Callable[..., torch.Tensor]) -> Attend:
    """Let a function of [B, H, S, K] take and return [B, S, H, K]."""
    return lambda q, k, v: attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _is_future(q_BSHK: torch.Tensor) -> torch.Tensor:
    position = torch.arange(q_BSHK.shape[1], device=q_BSHK.device)
    return position > position[:, None]


def _dense_bias(q_BSHK: torch.Tensor, slopes_H: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the bias [1, H, S, S], -inf for the future, a few rows at a time: it may be half of the memory."""
    seq_length = q_BSHK.shape[1]
    position = torch.arange(seq_length, device=q_BSHK.device)
    bias_HSS = torch.empty(len(slopes_H), seq_length, seq_length, dtype=dtype, device=q_BSHK.device)
    for bias_HQS, position_Q in zip(bias_HSS.split(_BIAS_ROWS, dim=1), position.split(_BIAS_ROWS), strict=True):
        for bias_QS, slope in zip(bias_HQS, slopes_H, strict=True):
            bias_QS.copy_(slope * (position - position_Q[:, None]))
            bias_QS.masked_fill_(position > position_Q[:, None], -torch.inf)
    return bias_HSS[None]


_16_BIT = (torch.bfloat16, torch.float16)
_WITHOUT_PROJECTIONS = "their module, its projections replaced by the identity, eager; joining q, k and v included"

PEERS = (
    Peer("sdpa_dense", "PyTorch's SDPA, dense bias in q's type", _build_dense, bytes_per_score=4),
    Peer("sdpa_dense_fp32", "the same, fp32 bias", _build_dense_fp32, dtypes=_16_BIT, bytes_per_score=8),
    Peer("flex", "torch flex_attention, compiled, score_mod and causal block mask", _build_flex, devices=("cuda",)),
    Peer(
        "flex_flash",
        "the same on its FlashAttention-4 back end",
        partial(_build_flex, kernel_options={"BACKEND": "FLASH"}),
        "flash_attn.cute",
        ("cuda",),
        _16_BIT,
        find_lack=_find_lack_of_flex_backends,
    ),
    Peer(
        "cudnn_folded",
        "PyTorch's SDPA through cuDNN, the bias in extra head dimensions, joining them included",
        _build_cudnn_folded,
        devices=("cuda",),
        dtypes=_16_BIT,
        find_lack=_find_lack_of_cudnn,
    ),
    Peer(
        "forgetting",
        "forgetting_attention with a constant gate, pruned (arXiv:2504.06949), finding the threshold included",
        _build_forgetting,
        "forgetting_transformer",
        ("cuda",),
        _16_BIT,
        find_lack=_find_lack_of_pruning,
    ),
    Peer(
        "flash_attn",
        "flash_attn_func, no bias",
        _build_flash,
        "flash_attn",
        ("cuda",),
        _16_BIT,
        find_lack=_find_lack_of_flash,
    ),
    Peer(
        "flash_attn_alibi",
        "flash_attn_func, alibi_slopes",
        _build_flash_alibi,
        "flash_attn",
        ("cuda",),
        _16_BIT,
        find_lack=_find_lack_of_flash,
    ),
    Peer("bloom", f"transformers, Bloom: {_WITHOUT_PROJECTIONS}", _build_bloom, "transformers", bytes_per_score=28),
    Peer("mpt", f"transformers, MPT: {_WITHOUT_PROJECTIONS}", _build_mpt, "transformers", bytes_per_score=28),
)
