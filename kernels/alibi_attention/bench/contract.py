"""How exact each back end is, measured: output, gradients and attention rows against the equation in fp64.

The yardstick is PyTorch's causal attention without a bias, in the same type and on the same q, k and v, against its own
fp64. It is also applied head by head: the outputs of steep heads are large and could hide the errors of shallow ones.

Shape suffixes: B batch, S sequence, H heads, K head dimension, Q queries of a block, T keys they see.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from alibi_attention.attention import attention
from alibi_attention.backend import Call, Capability
from alibi_attention.bench.peers import Attend
from alibi_attention.slopes import alibi_slopes

_LOGGER = logging.getLogger("alibi_attention")

HEAD_DIM = 64
HEAD_COUNTS = (8, 12, 20)
LENGTHS = (97, 1025, 4096, 16384)
INTERPRETED_LENGTHS = (97, 257)
_ALL_HEADS_UP_TO = 4096  # tokens; fp64 on two cores would take minutes per head count past it
_SOME_HEADS = 5
_FP64_UP_TO = 1025  # tokens; the fp64 truth is no better than what it judges, and more tokens show nothing new
_S_BY_S_UP_TO = 4096  # tokens; matrices of one head
_S_BY_S = ("reference", "unfused")
_LAST_QUERIES = 16
_BLOCK_BYTES = 1 << 25
_IDENTITY_BYTES = 1 << 27

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Row:
    """The errors of one back end in one type at one length, each the largest over all head counts."""

    backend: str
    """Name of the back end."""
    dtype: str
    """Type of q, k and v, as torch writes it."""
    length: int
    """The number of tokens in a row."""
    heads: str
    """Head counts of the models, and how many of their heads were measured if not all."""
    errors: tuple[float, ...]
    """||x - x64|| / ||x64|| of output, dq, dk and dv."""
    max_error: float
    """max |x - x64| / max |x64|, the largest of the four."""
    ratio: float
    """Largest of the four errors after each is divided by that of plain attention."""
    head_ratio: float
    """Largest such ratio of a single head."""
    total_variation: float
    """Mean total variation between the last queries' attention rows and the exact ones."""
    interpreted: bool = False
    """Whether Triton's interpreter ran it."""


def measure_contract(capabilities: Iterable[Capability], lengths: Sequence[int], device: str = "cpu") -> Iterator[Row]:
    """Measure every usable back end in every type it takes, and yield a row as soon as it is known.

    Args:
        capabilities: The back ends to measure, from ``backends()``.
        lengths: Numbers of tokens; interpreted back ends are measured at ``INTERPRETED_LENGTHS`` instead.
        device: Type of the device to measure on.
    """
    compiled = [capability for capability in capabilities if not is_interpreted(capability, device)]
    interpreted = [capability for capability in capabilities if is_interpreted(capability, device)]
    plan = [(length, compiled) for length in lengths] + [(length, interpreted) for length in INTERPRETED_LENGTHS]
    for length, group in plan:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            able = [c for c in group if c.find_refusal(Call(device, dtype, HEAD_DIM)) is None]
            able = [c for c in able if length <= _max_length(c.name, dtype)]
            if able:
                yield from measure_type(able, dtype, length, device)


def is_interpreted(capability: Capability, device: str) -> bool:
    """Return whether an interpreter runs this back end here in place of a GPU: correct, and a thousand times slower."""
    return device == "cpu" and capability.usable and "cpu" in capability.devices and not capability.auto


def exact_attention(inputs_BSHK: Tensors, slopes_H: torch.Tensor | None) -> list[torch.Tensor]:
    """Return output, dq, dk and dv of the equation in fp64 for q, k, v and the upstream gradient.

    It goes by blocks of queries, forward and backward, and holds no S x S matrix.
    """
    q, k, v, upstream = (x.double().transpose(1, 2).contiguous() for x in inputs_BSHK)
    output, dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    batch, num_heads, seq_length, head_dim = q.shape
    block_queries = max(1, _BLOCK_BYTES // (8 * batch * num_heads * seq_length))
    for start in range(0, seq_length, block_queries):
        rows, past = slice(start, start + block_queries), slice(0, start + block_queries)
        weights_BHQT = exact_rows(q[:, :, rows], k[:, :, past], slopes_H, start)
        output[:, :, rows] = weights_BHQT @ v[:, :, past]
        dv[:, :, past] += weights_BHQT.mT @ upstream[:, :, rows]
        mean_BHQ1 = (upstream[:, :, rows] * output[:, :, rows]).sum(-1, keepdim=True)
        dscores_BHQT = (upstream[:, :, rows] @ v[:, :, past].mT).sub_(mean_BHQ1).mul_(weights_BHQT)
        dscores_BHQT *= head_dim**-0.5
        dq[:, :, rows] = dscores_BHQT @ k[:, :, past]
        dk[:, :, past] += dscores_BHQT.mT @ q[:, :, rows]
    return [x.transpose(1, 2) for x in (output, dq, dk, dv)]


def exact_rows(
    q_BHQK: torch.Tensor, k_BHTK: torch.Tensor, slopes_H: torch.Tensor | None, first_position: int
) -> torch.Tensor:
    """Return the attention weights [B, H, Q, T] in fp64 of queries that start at ``first_position``."""
    scores_BHQT = (q_BHQK.double() @ k_BHTK.double().mT).mul_(q_BHQK.shape[-1] ** -0.5)
    position_Q = first_position + torch.arange(q_BHQK.shape[2], device=q_BHQK.device)
    distance_QT = position_Q[:, None] - torch.arange(k_BHTK.shape[2], device=q_BHQK.device)
    if slopes_H is not None:
        scores_BHQT -= slopes_H.double()[:, None, None] * distance_QT
    return scores_BHQT.masked_fill_(distance_QT < 0, -torch.inf).softmax(-1)


def measured_rows(attend: Attend, q_BQHK: torch.Tensor, k_BSHK: torch.Tensor) -> torch.Tensor:
    """Return the attention weights [H, Q, S] that a back end uses: its output for the columns of the identity as v."""
    (_, _, num_heads, head_dim), seq_length = q_BQHK.shape, k_BSHK.shape[1]
    piece_bytes = k_BSHK.element_size() * seq_length * head_dim * num_heads
    width = min(-(-seq_length // head_dim), max(1, _IDENTITY_BYTES // piece_bytes))  # pieces of the identity at once
    pieces = []
    for start in range(0, seq_length, width * head_dim):
        columns = start + torch.arange(width * head_dim, device=k_BSHK.device)
        identity_SC = (torch.arange(seq_length, device=k_BSHK.device)[:, None] == columns).to(k_BSHK.dtype)
        values_BSHK = identity_SC.unflatten(1, (width, head_dim)).transpose(0, 1).unsqueeze(2)
        expand = (width, -1, num_heads, -1)
        piece_BQHK = attend(q_BQHK.expand(expand), k_BSHK.expand(expand), values_BSHK.expand(expand))
        pieces.append(piece_BQHK.permute(2, 1, 0, 3).flatten(2))  # [H, Q, width * K]
    return torch.cat(pieces, dim=-1)[..., :seq_length]


def forward_backward(attend: Attend, inputs: Tensors) -> list[torch.Tensor]:
    """Return output, dq, dk and dv for q, k, v and the output's upstream gradient."""
    *qkv, upstream = inputs
    qkv = [x.detach().requires_grad_() for x in qkv]
    output = attend(*qkv)
    return [output.detach(), *torch.autograd.grad(output, qkv, upstream)]


def plain_attention(q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor) -> torch.Tensor:
    """Return PyTorch's causal attention without a bias, the yardstick."""
    q_BHSK, k_BHSK, v_BHSK = (x.transpose(1, 2) for x in (q_BSHK, k_BSHK, v_BSHK))
    return F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, is_causal=True).transpose(1, 2)


def draw_inputs(length: int, num_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return q, k, v and an upstream gradient, [1, length, num_heads, 64], standard normal."""
    generator = torch.Generator().manual_seed(length)
    shape = (1, length, num_heads, HEAD_DIM)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]


def choose_slopes(head_counts: Sequence[int], count: int) -> torch.Tensor:
    """Return ``count`` slopes of models of these head counts, from the steepest of all to the shallowest."""
    falling = torch.cat([alibi_slopes(num_heads) for num_heads in head_counts]).unique().flip(0)
    return falling[torch.linspace(0, len(falling) - 1, count).round().long()]


def measure_type(
    able: Sequence[Capability],
    dtype: torch.dtype,
    length: int,
    device: str = "cpu",
    head_counts: Sequence[int] = HEAD_COUNTS,
) -> Iterator[Row]:
    """Measure some back ends that take this type, on the same inputs, for which the fp64 results are computed once.

    A back end that refuses when it is run is named in a warning and has no row.
    """
    some = length > _ALL_HEADS_UP_TO or any(is_interpreted(capability, device) for capability in able)
    by_backend: dict[str, list[tuple[list[float], float, float, float, float]]] = {c.name: [] for c in able}
    models = [choose_slopes(head_counts, _SOME_HEADS)] if some else [alibi_slopes(count) for count in head_counts]
    for slopes in (slopes.to(device) for slopes in models):
        inputs = [x.to(device) for x in draw_inputs(length, len(slopes), dtype)]
        plain = forward_backward(plain_attention, inputs), exact_attention(inputs, None)
        exact = exact_attention(inputs, slopes)
        for name in tuple(by_backend):
            try:
                by_backend[name].append(_measure_backend(name, inputs, slopes, exact, plain))
            except RuntimeError as error:  # a build of its library may lack what the library can do
                said = str(error).partition("\n")[0]
                _LOGGER.warning("%s %s %d tokens is left out: %s", name, _name_dtype(dtype), length, said)
                del by_backend[name]
    heads = ", ".join(map(str, head_counts))
    for capability in (c for c in able if c.name in by_backend):
        errors, max_errors, ratios, head_ratios, variations = zip(*by_backend[capability.name], strict=True)
        yield Row(
            backend=capability.name,
            dtype=_name_dtype(dtype),
            length=length,
            heads=f"{_SOME_HEADS} of {heads}" if some else heads,
            errors=tuple(max(column) for column in zip(*errors, strict=True)),
            max_error=max(max_errors),
            ratio=max(ratios),
            head_ratio=max(head_ratios),
            total_variation=max(variations),
            interpreted=is_interpreted(capability, device),
        )


def _measure_backend(
    name: str, inputs: Tensors, slopes_H: torch.Tensor, exact: Tensors, plain: tuple[Tensors, Tensors]
) -> tuple[list[float], float, float, float, float]:
    """Return the four errors, the largest max error, the largest ratios and the total variation of the rows."""

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        # One head at a time where a head's memory is S x S.
        heads_at_once = 1 if name in _S_BY_S else len(slopes_H)
        parts = [
            attention(*part, alibi_slopes=slopes, backend=name)
            for *part, slopes in zip(
                *(x.split(heads_at_once, dim=2) for x in qkv), slopes_H.split(heads_at_once), strict=True
            )
        ]
        return torch.cat(parts, dim=2)

    results = forward_backward(attend, inputs)
    errors, ratios = _errors(results, exact), _errors(results, exact) / _errors(*plain)
    head_ratios = _errors(results, exact, by_head=True) / _errors(*plain, by_head=True)
    pairs = zip(results, exact, strict=True)
    max_error = max(((x.double() - y).abs().max() / y.abs().max()).item() for x, y in pairs)

    q, k = inputs[0][:, -_LAST_QUERIES:], inputs[1]
    rows_HQS = measured_rows(attend, q, k)
    exact_HQS = exact_rows(q.transpose(1, 2), k.transpose(1, 2), slopes_H, k.shape[1] - q.shape[1])[0]
    variation = (rows_HQS.double() - exact_HQS).abs().sum(-1).mean().item() / 2
    return errors.tolist(), max_error, ratios.max().item(), head_ratios.max().item(), variation


def _errors(results: Tensors, exact: Tensors, *, by_head: bool = False) -> torch.Tensor:
    """Return ||x - x64|| / ||x64|| of output, dq, dk and dv, [4], or of each head, [4, H]."""
    norm = partial(torch.linalg.vector_norm, dim=(0, 1, 3) if by_head else (0, 1, 2, 3))
    return torch.stack([norm(x.double() - y) / norm(y) for x, y in zip(results, exact, strict=True)])


def format_contract(rows: Iterable[Row]) -> str:
    """Return the rows as a table; ``ratio`` is what the bars are about."""
    columns = ("back end", "type", "tokens", "heads", "output", "dq", "dk", "dv", "max", "ratio", "of a head", "rows")
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "--:|---|" + "--:|" * 8]
    for row in sorted(rows, key=lambda row: (row.backend, row.dtype, row.length)):
        name = f"`{row.backend}`" + (" (Triton interpreter)" if row.interpreted else "")
        errors = (*row.errors, row.max_error)
        cells = [name, row.dtype, str(row.length), row.heads, *(f"{error:.1e}" for error in errors)]
        cells += [f"{row.ratio:.2f}", f"{row.head_ratio:.2f}", f"{row.total_variation:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _name_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _max_length(name: str, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return _FP64_UP_TO
    return _S_BY_S_UP_TO if name in _S_BY_S else math.inf
