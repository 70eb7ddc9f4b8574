"""Keys and values of the tokens so far, of which an ALiBi head keeps those that it can still see.

A head forgets keys from a distance on that grows with what its queries have asked for so far, and it checks each query
that comes against the keys that are gone, by the inequality (*) of ``alibi_attention.horizon``. Where it holds, the
forgotten keys have at most ``horizon_eps`` of the query's weights: proven, whatever the keys were. Where it fails, the
head has seen a query that asks for more than any before: ``has_failed`` is true, what the step returned is worthless,
and whoever holds the tokens calls ``reset`` and runs them again. The distance has grown by then.

What is remembered of the keys that are gone is a number for each head: a bound N on their norms, the largest norm of
all keys up to the last time that some were dropped. Norms are taken from a centre, the mean of the head's first keys.

Dropping is amortised: keys stand in buffers with room for ROOM_TOKENS more, and when that is used up, what is still
needed moves into new ones. Heads that keep equally many keys share a buffer and a call of attention, and so that there
are such heads, a distance is rounded up by at most a quarter of itself.

Beside this, attention itself leaves out up to its own ``horizon_eps`` of a row, 2^-24 in all models.

Shapes: B batch, which is 1 for a cache; S new tokens, A heads of this rank, G heads of a group, T kept tokens, K head
dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alibi_attention import attention
from alibi_attention.horizon import distance_to_keep, excess_terms, key_norms, log_share_of_gone
from megalibi.model.positions import ScoreBias

ROOM_TOKENS = 256
"""How many tokens come between two times that keys are dropped."""
FEWEST_TOKENS = 256
"""What every head keeps: fewer keys would cost as much time, and a call of attention more for each other number."""
CENTRE_TOKENS = 64
"""The fewest keys whose mean is taken for the centre of a head's keys; before there are as many, all are kept."""
EXCESS_MARGIN = 1.25
"""A head keeps keys for queries whose excess is larger by this factor than that of all queries it has seen."""
FEW_QUERIES = 8
"""Up to here the equation itself is fastest: kernels work on blocks of queries, most of which would be empty."""


@dataclass(kw_only=True)
class _HeadGroup:
    """Heads whose first ``gone`` keys are gone, and the keys and values that they keep, [G, T, K] each."""

    heads: list[int]
    gone: int
    keys: Tensor
    values: Tensor


class LayerCache:
    """The keys and values of one layer, for one row of tokens.

    Args:
        horizon_eps: Largest share of a query's weights that forgotten keys may hold; 0 keeps all keys.
    """

    def __init__(self, horizon_eps: float) -> None:
        self.horizon_eps = horizon_eps
        self._excess_A: Tensor | None = None  # the largest of all queries; it outlives a reset
        self.reset()

    def reset(self) -> None:
        """Forget all tokens, but not how far the heads have had to look."""
        self.num_tokens = 0
        self.has_failed = False
        self._groups: list[_HeadGroup] = []
        self._room = 0
        self._slopes_A: Tensor | None = None
        self._centre_AK: Tensor | None = None
        self._gone_A = torch.zeros(0, dtype=torch.int64)
        self._norm_A = self._gone_norm_A = torch.zeros(0)  # of all keys, and of all when keys last went

    def attend(self, q_BSAK: Tensor, k_BSAK: Tensor, v_BSAK: Tensor, bias: ScoreBias, *, backend: str) -> Tensor:
        """Take the keys and values of the next tokens, and return what their queries see, [B, S, A, K].

        Args:
            q_BSAK: Queries of the next tokens; B is 1.
            k_BSAK: Their keys.
            v_BSAK: Their values.
            bias: What is added to the scores.
            backend: The back end of attention for many queries.
        """
        assert len(q_BSAK) == 1, "a cache holds one row"
        seq_length = q_BSAK.shape[1]
        if self.num_tokens == 0:
            self._begin(k_BSAK[0], bias.alibi_slopes)
        terms = self._note(q_BSAK[0], k_BSAK[0])
        if seq_length > self._room:
            self._move(seq_length)
        if terms is not None:
            self._check(*terms)
        self._append(k_BSAK[0], v_BSAK[0])
        backend = "reference" if seq_length <= FEW_QUERIES else backend
        outputs = [_attend_group(group, self.num_tokens, q_BSAK, bias, backend) for group in self._groups]
        if len(outputs) == 1:
            return outputs[0]
        y_BSAK = torch.empty_like(q_BSAK)
        for group, output_BSGK in zip(self._groups, outputs, strict=True):
            y_BSAK[:, :, group.heads] = output_BSGK
        return y_BSAK

    def trim(self) -> None:
        """Drop now what need not be kept: a long prompt leaves more of it than single tokens do."""
        if self.num_tokens > 0:
            self._move(0)

    def kept_tokens(self) -> list[int]:
        """Return how many tokens each head of this rank keeps."""
        return [self.num_tokens - gone for gone in self._gone_A.tolist()]

    def memory_bytes(self) -> int:
        """Return the bytes of the buffers, the room in them included."""
        return sum(group.keys.nbytes + group.values.nbytes for group in self._groups)

    def _begin(self, k_SAK: Tensor, slopes_A: Tensor | None) -> None:
        num_heads, device = k_SAK.shape[1], k_SAK.device
        self._slopes_A = slopes_A if self.horizon_eps > 0.0 else None
        self._gone_A = torch.zeros(num_heads, dtype=torch.int64, device=device)
        self._norm_A = self._gone_norm_A = torch.zeros(num_heads, dtype=torch.float64, device=device)
        if self._excess_A is None:
            self._excess_A = torch.zeros_like(self._norm_A)
        empty_GTK = k_SAK.new_empty(num_heads, 0, k_SAK.shape[2])
        self._groups = [_HeadGroup(heads=list(range(num_heads)), gone=0, keys=empty_GTK, values=empty_GTK)]

    def _note(self, q_SAK: Tensor, k_SAK: Tensor) -> tuple[Tensor, Tensor] | None:
        """Take the new tokens into the largest norm and the largest excess, and return the queries' terms, [S, A] each.

        None: there is no centre yet, or nothing is ever dropped.
        """
        if self._slopes_A is None:
            return None
        if self._centre_AK is None:
            if self.num_tokens + len(k_SAK) < CENTRE_TOKENS:
                return None
            (group,) = self._groups  # nothing is gone yet, so the norms of all keys can be taken now
            all_keys_SAK = torch.cat([group.keys[:, : self.num_tokens].transpose(0, 1), k_SAK]).double()
            self._centre_AK = all_keys_SAK.mean(dim=0)
            self._norm_A = key_norms(all_keys_SAK - self._centre_AK).amax(dim=0)
        centred_SAK = k_SAK.double() - self._centre_AK
        self._norm_A = torch.maximum(self._norm_A, key_norms(centred_SAK).amax(dim=0))
        of_norm_SA, rest_SA = excess_terms(q_SAK, centred_SAK, softmax_scale=q_SAK.shape[-1] ** -0.5)
        assert self._excess_A is not None
        self._excess_A = torch.maximum(self._excess_A, (of_norm_SA * self._norm_A + rest_SA).amax(dim=0))
        return of_norm_SA, rest_SA

    def _check(self, of_norm_SA: Tensor, rest_SA: Tensor) -> None:
        """Check (*) of each query against the keys that are gone."""
        assert self._slopes_A is not None
        if not self._gone_A.any():
            return
        excess_SA = of_norm_SA * self._gone_norm_A + rest_SA
        share_A = log_share_of_gone(excess_SA, self._gone_A, self._slopes_A, first_query=self.num_tokens)
        # Written so that NaN fails.
        failed_A = ~(share_A <= math.log(self.horizon_eps))
        if bool(failed_A.any()):
            self.has_failed = True
            assert self._excess_A is not None  # raised once more, so that no number of rebuilds is in vain
            self._excess_A = torch.where(failed_A, EXCESS_MARGIN * self._excess_A, self._excess_A)

    def _move(self, num_new: int) -> None:
        """Move the keys that are still needed into buffers with room for the new ones and ROOM_TOKENS more."""
        if self._slopes_A is not None and self._centre_AK is not None:
            assert self._excess_A is not None
            distance_A = distance_to_keep(
                EXCESS_MARGIN * self._excess_A,
                self._slopes_A,
                num_keys=self.num_tokens + 1,
                horizon_eps=self.horizon_eps,
            )
            # The first new query stands at num_tokens; with so many keys kept, the last one gone is further away.
            distance_A = distance_A.clamp(min=FEWEST_TOKENS)
            unit_A = 2 ** (distance_A.double().log2().floor() - 2).long()
            kept_A = (distance_A + unit_A - 1) // unit_A * unit_A
            gone_A = torch.maximum(self._gone_A, self.num_tokens - kept_A)
            self._gone_norm_A = torch.where(gone_A > self._gone_A, self._norm_A, self._gone_norm_A)
            self._gone_A = gone_A
        self._room = num_new + ROOM_TOKENS
        self._groups = self._regroup(self._gone_A.tolist())

    def _regroup(self, gone_by_head: list[int]) -> list[_HeadGroup]:
        old = {head: (group, row) for group in self._groups for row, head in enumerate(group.heads)}
        groups = []
        for gone in sorted(set(gone_by_head)):
            heads = [head for head, its_gone in enumerate(gone_by_head) if its_gone == gone]
            kept = self.num_tokens - gone
            like = self._groups[0].keys
            k_GTK, v_GTK = (like.new_empty(len(heads), kept + self._room, like.shape[2]) for _ in "kv")
            for row, head in enumerate(heads):
                group, old_row = old[head]
                stay = slice(gone - group.gone, self.num_tokens - group.gone)
                k_GTK[row, :kept] = group.keys[old_row, stay]
                v_GTK[row, :kept] = group.values[old_row, stay]
            groups.append(_HeadGroup(heads=heads, gone=gone, keys=k_GTK, values=v_GTK))
        return groups

    def _append(self, k_SAK: Tensor, v_SAK: Tensor) -> None:
        for group in self._groups:
            start = self.num_tokens - group.gone
            new = slice(start, start + len(k_SAK))
            group.keys[:, new] = k_SAK[:, group.heads].transpose(0, 1)
            group.values[:, new] = v_SAK[:, group.heads].transpose(0, 1)
        self.num_tokens += len(k_SAK)
        self._room -= len(k_SAK)


def _attend_group(group: _HeadGroup, num_tokens: int, q_BSAK: Tensor, bias: ScoreBias, backend: str) -> Tensor:
    """Return what the queries of a group's heads see, [1, S, G, K]: to ALiBi only distances matter."""
    kept = num_tokens - group.gone
    all_heads = len(group.heads) == q_BSAK.shape[2]
    slopes_A = bias.alibi_slopes
    return attention(
        q_BSAK if all_heads else q_BSAK[:, :, group.heads],
        group.keys[:, :kept].transpose(0, 1).unsqueeze(0),
        group.values[:, :kept].transpose(0, 1).unsqueeze(0),
        alibi_slopes=slopes_A if all_heads or slopes_A is None else slopes_A[group.heads],
        distance_bias=bias.distance_bias,
        backend=backend,
    )


def attend_rows(
    caches: Sequence[LayerCache], q_BSAK: Tensor, k_BSAK: Tensor, v_BSAK: Tensor, bias: ScoreBias, *, backend: str
) -> Tensor:
    """Return what the queries of the next tokens see, each row in its own cache, [B, S, A, K]."""
    rows = zip(caches, q_BSAK.split(1), k_BSAK.split(1), v_BSAK.split(1), strict=True)
    return torch.cat([cache.attend(q, k, v, bias, backend=backend) for cache, q, k, v in rows])


class KeyValueCache:
    """The keys and values of all layers, for one row of tokens.

    Args:
        num_layers: Number of layers.
        horizon_eps: Largest share of a query's weights that forgotten keys may hold in a head; 0 keeps all keys. Models
            without ALiBi keep all keys in any case.
    """

    def __init__(self, num_layers: int, *, horizon_eps: float) -> None:
        self.layers: Sequence[LayerCache] = [LayerCache(horizon_eps) for _ in range(num_layers)]

    @property
    def num_tokens(self) -> int:
        """The number of tokens that have come, those that are forgotten included."""
        return self.layers[-1].num_tokens  # the last layer is the last to take them

    @property
    def has_failed(self) -> bool:
        """Whether a query needed keys that are gone, so that the tokens must be run again after ``reset``."""
        return any(layer.has_failed for layer in self.layers)

    def reset(self) -> None:
        """Forget all tokens, but not how far the heads have had to look."""
        for layer in self.layers:
            layer.reset()

    def trim(self) -> None:
        """Drop now what need not be kept."""
        for layer in self.layers:
            layer.trim()

    def kept_tokens(self) -> list[list[int]]:
        """Return how many tokens each head of this rank keeps, by layer."""
        return [layer.kept_tokens() for layer in self.layers]

    def memory_bytes(self) -> int:
        """Return the bytes of all buffers of this rank."""
        return sum(layer.memory_bytes() for layer in self.layers)
