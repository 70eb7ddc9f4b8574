"""The interface: one function that checks its arguments, chooses a back end and calls it."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import cache

import torch

from alibi_attention.backend import AttentionInputs, Backend, Call, Capability
from alibi_attention.backends import flash, meta, reference, sdpa, unfused
from alibi_attention.backends.folded import attend as folded
from alibi_attention.backends.native import attend as native
from alibi_attention.backends.triton import attend as triton
from alibi_attention.documents import PackedDocuments

_LOGGER = logging.getLogger("alibi_attention")

# "auto" takes the first that can run a call. It never gets to unfused: reference and meta can run all that it can.
_ORDER: tuple[Backend, ...] = (native, triton, flash, folded, sdpa, reference, meta, unfused)
# Without a bias the GPU kernels that others have tuned come before ours.
_ORDER_WITHOUT_BIAS: tuple[Backend, ...] = (native, flash, sdpa, triton, reference, meta)
_BACKENDS: dict[str, Backend] = {backend.NAME: backend for backend in _ORDER}


def attention(
    q_BSHK: torch.Tensor,
    k_BSHK: torch.Tensor,
    v_BSHK: torch.Tensor,
    *,
    alibi_slopes: torch.Tensor | None,
    distance_bias: torch.Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    cu_seqlens: torch.Tensor | PackedDocuments | None = None,
    dropout_p: float = 0.0,
    query_offset: int | None = None,
    horizon_eps: float = 2.0**-24,
    backend: str = "auto",
) -> torch.Tensor:
    """Return softmax(softmax_scale * q k^T - slope * (i - j)) v, over the keys j <= i, in q's shape and type.

    The bias is formed in fp32 or wider, whatever the type of q, also under autocast. Neither ``softmax_scale`` nor a
    scale that the caller puts on q multiplies it. The result is differentiable in q, k and v.

    Args:
        q_BSHK: Queries [batch, queries, heads, head dimension].
        k_BSHK: Keys [batch, keys, heads, head dimension].
        v_BSHK: Values, of the keys' shape.
        alibi_slopes: Slopes [heads], fp32, of the heads given here; None for attention without them.
        distance_bias: In place of slopes, what is added to the score of a query and the key d positions before it, as
            T5's learned bias: [heads, distances], fp32, for every d >= 0 that occurs. It may require a gradient.
        causal: Must be True: ALiBi's bias is defined for the past only.
        softmax_scale: Factor of q k^T, above 0; 1 / sqrt(head dimension) if None.
        cu_seqlens: Document boundaries [N + 1], int32, over the flattened batch * queries tokens, from 0 to their
            number; attention crosses none of them. Ends of rows are boundaries only if they are listed. A model gives
            all of its layers one ``PackedDocuments``: a tensor is read back at each call, which waits for the device.
        dropout_p: Probability with which an attention weight is dropped.
        query_offset: Position of the first query, where the first key has position 0. If None, the last query stands
            at the last key.
        horizon_eps: Back ends with a horizon leave out keys that provably hold, together, at most this share of a
            query's attention weights (horizon.py); 0 leaves out nothing. The default is half an fp32 rounding step.
        backend: "auto" or a name listed by ``backends()``.

    Raises:
        ValueError: An argument has a wrong shape, type or value.
        RuntimeError: The named back end cannot do this call.
    """
    if not causal:
        raise ValueError("causal=False: must be True; ALiBi's bias is defined for the past only")
    _check_tensors(q_BSHK, k_BSHK, v_BSHK)
    _check_slopes(q_BSHK, alibi_slopes)
    if softmax_scale is None:
        softmax_scale = q_BSHK.shape[-1] ** -0.5
    _check_numbers(softmax_scale, dropout_p, horizon_eps)
    documents = None if cu_seqlens is None else _find_documents(q_BSHK, k_BSHK, cu_seqlens, query_offset)
    if distance_bias is not None:
        _check_distance_bias(q_BSHK, k_BSHK, distance_bias, alibi_slopes, query_offset, documents)
    num_keys = k_BSHK.shape[1]
    if query_offset is None:
        query_offset = num_keys - q_BSHK.shape[1]
    if query_offset < 0:
        raise ValueError(f"query_offset={query_offset}: must be 0 or more; a query before the first key sees nothing")
    # From the last key on, every query sees all keys, and only their distances from each other matter to its softmax:
    # a large distance common to all of them would cost digits.
    query_offset = min(query_offset, num_keys - 1)
    call = Call(
        q_BSHK.device.type,
        q_BSHK.dtype,
        q_BSHK.shape[-1],
        dropout=dropout_p > 0.0,
        documents=documents is not None,
        gap=query_offset + q_BSHK.shape[1] > num_keys,
        bias="distance" if distance_bias is not None else "no" if alibi_slopes is None else "alibi",
    )
    chosen = _BACKENDS[_resolve(backend, call)]
    inputs = AttentionInputs(
        q_BSHK,
        k_BSHK,
        v_BSHK,
        alibi_slopes=alibi_slopes,
        distance_bias=distance_bias,
        softmax_scale=softmax_scale,
        documents=documents,
        dropout_p=dropout_p,
        query_offset=query_offset,
        horizon_eps=horizon_eps,
    )
    # Autocast would cast the bias to 16 bits together with q, k and v. Switching it off takes as long as a kernel may.
    autocast = call.device_type != "meta" and torch.is_autocast_enabled(call.device_type)
    with torch.autocast(call.device_type, enabled=False) if autocast else nullcontext():
        return chosen.attend(inputs)


def backends() -> list[Capability]:
    """Return what each back end can do here, in the order in which "auto" tries them.

    Left out is what computes no attention: the one of the meta device alone, which a plan takes by itself or by name.
    """
    capabilities = [backend.capability() for backend in _ORDER]
    return [capability for capability in capabilities if capability.devices != (meta.NAME,)]


def resolve_backend(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    dropout: bool = False,
    documents: bool = False,
    bias: str = "alibi",
) -> str:
    """Return the name of the back end that ``attention(..., backend=name)`` will use for such tensors.

    Args:
        name: "auto" or a name listed by ``backends()``.
        device: Device of q, k and v.
        dtype: Type of q, k and v.
        head_dim: Head dimension of q, k and v.
        dropout: Whether attention weights will be dropped.
        documents: Whether ``cu_seqlens`` will be given.
        bias: "alibi" for slopes, "distance" for a distance bias, or "no".

    Raises:
        ValueError: There is no back end of that name.
        RuntimeError: The back end cannot run such a call; the message says why.
    """
    return _resolve(name, Call(torch.device(device).type, dtype, head_dim, dropout, documents, bias=bias))


@cache
def _resolve(name: str, call: Call) -> str:
    """Resolve a name; cached, so that capabilities are asked once and "auto" logs its choice once."""
    if name not in ("auto", *_BACKENDS):
        raise ValueError(f"backend={name!r}: must be one of auto, {', '.join(backend.name for backend in backends())}")
    passed_over: list[str] = []
    order = _ORDER_WITHOUT_BIAS if call.bias == "no" else _ORDER
    for candidate in [backend.NAME for backend in order] if name == "auto" else (name,):
        capability = _BACKENDS[candidate].capability()
        refusal = capability.find_refusal(call)
        if name == "auto" and refusal is None and not capability.auto:
            refusal = "it runs in an interpreter here, by name alone"
        if refusal is None:
            if name == "auto":
                because = f" (not {'; not '.join(passed_over)})" if passed_over else ""
                _LOGGER.info("attention back end for %s: %s%s", call, candidate, because)
            return candidate
        passed_over.append(f"{candidate}: {refusal}")
    raise RuntimeError(f"backend={name!r} cannot run: {'; '.join(passed_over)}")


def _check_tensors(q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor) -> None:
    if q_BSHK.dim() != 4 or 0 in q_BSHK.shape:
        raise ValueError(f"q_BSHK: must be [batch, queries, heads, head dimension], got {tuple(q_BSHK.shape)}")
    batch, _, num_heads, head_dim = q_BSHK.shape
    if k_BSHK.dim() != 4 or k_BSHK.shape != (batch, k_BSHK.shape[1], num_heads, head_dim) or k_BSHK.shape[1] == 0:
        expected = f"[{batch}, keys, {num_heads}, {head_dim}]"
        raise ValueError(f"k_BSHK: must be {expected} as q_BSHK is, got {tuple(k_BSHK.shape)}")
    if v_BSHK.shape != k_BSHK.shape:
        raise ValueError(f"v_BSHK: must be {tuple(k_BSHK.shape)} as k_BSHK is, got {tuple(v_BSHK.shape)}")
    for name, x in (("k_BSHK", k_BSHK), ("v_BSHK", v_BSHK)):
        if x.dtype != q_BSHK.dtype or x.device != q_BSHK.device:
            wanted = f"{q_BSHK.dtype} on {q_BSHK.device}"
            raise ValueError(f"{name}: must be {wanted} as q_BSHK is, got {x.dtype} on {x.device}")


def _check_slopes(q_BSHK: torch.Tensor, alibi_slopes: torch.Tensor | None) -> None:
    if alibi_slopes is None:
        return
    if alibi_slopes.dtype != torch.float32:
        # Somebody's .bfloat16() or .half() has already rounded them: casting back would hide it.
        raise ValueError(f"alibi_slopes: must be torch.float32 and never cast, got {alibi_slopes.dtype}")
    if alibi_slopes.shape != q_BSHK.shape[2:3]:
        given = tuple(alibi_slopes.shape)
        raise ValueError(f"alibi_slopes: must be [{q_BSHK.shape[2]}], one for each head of q_BSHK, got {given}")
    if alibi_slopes.device != q_BSHK.device:
        raise ValueError(f"alibi_slopes: must be on {q_BSHK.device} as q_BSHK is, got {alibi_slopes.device}")
    if alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes: must not require a gradient, slopes are constants")


def _check_numbers(softmax_scale: float, dropout_p: float, horizon_eps: float) -> None:
    if not softmax_scale > 0.0:  # kernels take maxima before they scale
        raise ValueError(f"softmax_scale={softmax_scale}: must be above 0")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p={dropout_p}: must be in [0, 1)")
    if not 0.0 <= horizon_eps < 1.0:
        raise ValueError(f"horizon_eps={horizon_eps}: must be in [0, 1)")


def _check_distance_bias(
    q_BSHK: torch.Tensor,
    k_BSHK: torch.Tensor,
    distance_bias: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    query_offset: int | None,
    documents: PackedDocuments | None,
) -> None:
    if alibi_slopes is not None:
        raise ValueError("distance_bias: goes in place of alibi_slopes, which must be None")
    queries, keys = q_BSHK.shape[1], k_BSHK.shape[1]
    if query_offset is not None and query_offset + queries > keys:
        raise ValueError(f"query_offset={query_offset}: with a distance_bias no query may stand beyond the last key")
    longest = keys if documents is None else documents.max_length  # documents may cross the rows of the batch
    shape = tuple(distance_bias.shape)
    if len(shape) != 2 or shape[0] != q_BSHK.shape[2] or shape[1] < longest:
        raise ValueError(f"distance_bias: must be [{q_BSHK.shape[2]}, {longest} or more distances], got {shape}")
    if distance_bias.dtype not in (torch.float32, torch.float64) or distance_bias.device != q_BSHK.device:
        given = f"{distance_bias.dtype} on {distance_bias.device}"
        raise ValueError(f"distance_bias: must be torch.float32 on {q_BSHK.device}, got {given}")


def _find_documents(
    q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, cu_seqlens: torch.Tensor | PackedDocuments, query_offset: int | None
) -> PackedDocuments:
    if q_BSHK.shape != k_BSHK.shape or query_offset not in (None, 0):
        raise ValueError("cu_seqlens: needs as many queries as keys and no query_offset")
    num_tokens = q_BSHK.shape[0] * q_BSHK.shape[1]
    if isinstance(cu_seqlens, torch.Tensor):
        return PackedDocuments(cu_seqlens, num_tokens, q_BSHK.device)
    if cu_seqlens.num_tokens != num_tokens or cu_seqlens.cu_seqlens.device != q_BSHK.device:
        given = f"of {cu_seqlens.num_tokens} tokens on {cu_seqlens.cu_seqlens.device}"
        raise ValueError(f"cu_seqlens: must be of the batch's {num_tokens} tokens on {q_BSHK.device}, got {given}")
    return cu_seqlens
