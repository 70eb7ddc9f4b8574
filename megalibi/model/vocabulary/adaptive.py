"""Adaptive embedding (arXiv:1809.10853) and adaptive softmax (arXiv:1609.04309): rare tokens get narrow rows.

The vocabulary, sorted by falling frequency, is cut into bands. Band i has a table of width H / factor^i and a
projection from that width to H. The output layer predicts a frequent token or the band of a rare one, and only for the
tokens of that band the token within it::

    p(token) = head(token)                for a token of band 0
    p(token) = head(band) * tail(token)   for a token of a later band

Tables and projections may be tied to the embedding's. The head uses band 0's table without its projection, as fairseq
does (transformer_lm_wiki103), and the embedding is multiplied by sqrt(H), as there.

Every table is cut over the tensor group along its rows. Projections and the head's rows for bands are small: each rank
holds all of them.

Shapes: B batch, S sequence, N tokens of a batch, M tokens of a band, H hidden, D width of a band, V tokens of a band
(of this rank's rows), T later bands.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalibi.config import AdaptiveBand, ModelConfig, adaptive_bands
from megalibi.model.dropout import OUTSIDE_BLOCKS, ResidualDropout, Site
from megalibi.model.init import Normal, set_init, xavier_std
from megalibi.model.vocabulary.loss import in_chunks
from megalibi.parallel import (
    IGNORED_LABEL,
    WHOLE,
    Group,
    Layout,
    ShardSpec,
    VocabParallelEmbedding,
    all_gather_raw,
    copy_to_tensor_group,
    gather_from_sequence,
    linear,
    matmul,
    parallel_lm_logits,
    set_shard_spec,
    use_replicated_param,
    vocab_parallel_cross_entropy,
)

TAIL_TOKENS = 64
"""The tokens of a later band are filled up to a multiple of this. A new number of them in every step would make oneDNN
compile and keep a matmul for each, and a GPU's allocator keep blocks of every size."""


class AdaptiveEmbedding(nn.Module):
    """sqrt(H) x the projected row of each token.

    Args:
        model: The network, with cutoffs.
        group: The tensor group.
    """

    def __init__(self, model: ModelConfig, *, group: Group) -> None:
        super().__init__()
        self.scale = math.sqrt(model.hidden_size)
        self.bands = nn.ModuleList(
            BandEmbedding(band, model.hidden_size, group=group) for band in adaptive_bands(model)
        )

    def forward(self, ids_BS: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return [B, S, H], in ``dtype`` or else the weights', the same on every rank."""
        # Every band works on every token and adds zeros for those of the others: shapes stay the same, and it is less
        # work than one matrix of one block.
        x_BSH = self.bands[0](ids_BS, dtype)
        for band in self.bands[1:]:
            x_BSH = x_BSH + band(ids_BS, dtype)
        return self.scale * x_BSH


class BandEmbedding(nn.Module):
    """The projected row of each token of one band, and zeros for all others."""

    def __init__(self, band: AdaptiveBand, hidden_size: int, *, group: Group) -> None:
        super().__init__()
        self.band = band
        self.table = VocabParallelEmbedding(band.size, band.padded_size(group.size), band.width, layout=Layout(group))
        self.projection = Projection(band.width, hidden_size)
        set_init(self.table.weight, Normal(band.width**-0.5))

    def forward(self, ids_BS: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Return [B, S, H]."""
        outside_BS = (ids_BS < self.band.start) | (ids_BS >= self.band.stop)
        # -1 is no row of any rank; the next band's ids would be found among this one's padding.
        return self.projection(self.table((ids_BS - self.band.start).masked_fill(outside_BS, -1), dtype))


class Projection(nn.Module):
    """From the width of a band to H, whole on every rank."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, width))
        set_init(self.weight, Normal(xavier_std(width, hidden_size)))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return [B, S, H]."""
        return linear(x_BSD, self.weight.to(x_BSD.dtype))


class AdaptiveSoftmax(nn.Module):
    """From the last hidden states to the loss of each token.

    A tied weight is held here as well as in the embedding, one parameter under two names, by the module whose call
    uses it: that is where ZeRO 3 gathers it.

    Args:
        model: The network, with cutoffs.
        embedding: Its embedding, whose tables and projections are used here too if the model ties them.
        layout: How the ranks share the tables and the hidden states.
    """

    def __init__(self, model: ModelConfig, embedding: AdaptiveEmbedding, *, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        group = layout.tensor
        self.dropout = ResidualDropout(model.adaptive_softmax_dropout, OUTSIDE_BLOCKS, layout=layout)
        first, *others = adaptive_bands(model)
        tied: list[Any] = list(embedding.bands) if model.tie_embeddings else [None] * (1 + len(others))
        self.head = Head(first, len(others), tied[0], group=group)
        self.tails = nn.ModuleList(
            Tail(model, number, band, tied[number], group=group) for number, band in enumerate(others, start=1)
        )

    def forward(self, x_BSH: Tensor, labels_BS: Tensor, micro_batch_key: int | None = None) -> Tensor:
        """Return the cross entropy of each token in nats, fp32 [B, S], the same on every rank of the tensor group.

        Args:
            x_BSH: Last hidden states; cut along S under sequence parallelism.
            labels_BS: The next tokens, whole on every rank; IGNORED_LABEL where there is no loss.
            micro_batch_key: Keys dropout; None: no dropout.
        """
        x_NH = self._enter(self.dropout(x_BSH, Site.ADAPTIVE_SOFTMAX, micro_batch_key)).flatten(0, 1)
        labels_N = labels_BS.flatten()
        losses_N = self.head(x_NH, self._head_labels(labels_N))
        for tail in self._tails:
            index_M = tail.contains(labels_N).nonzero().squeeze(1)
            # Filled up with the first token, which has no loss here. Never empty: under ZeRO 3 all data ranks gather
            # the weights of a band, whether they have a token of it or not.
            spare = max(1, math.ceil(len(index_M) / TAIL_TOKENS)) * TAIL_TOKENS - len(index_M)
            labels_M = F.pad(labels_N[index_M] - tail.band.start, (0, spare), value=IGNORED_LABEL)
            index_M = F.pad(index_M, (0, spare))
            losses_N = losses_N.index_add(0, index_M, tail(x_NH[index_M], labels_M, micro_batch_key))
        return losses_N.view_as(labels_BS)

    @torch.no_grad()
    def log_probs(self, x_BSH: Tensor) -> Tensor:
        """Return the log-probability of every token of the vocabulary, fp32 [B, S, V], the same on every rank."""
        x_NH = self._enter(x_BSH).flatten(0, 1)
        num_tokens = self.head.band.size
        logits = torch.cat([_whole(self.head.token_logits(x_NH), self.head.band, self.layout.tensor),
                            self.head.band_logits(x_NH)], dim=1)  # fmt: skip
        head = _log_softmax(logits)
        parts = [head[:, :num_tokens]]
        for number, tail in enumerate(self._tails):
            logits = _whole(tail.logits(tail.narrow(x_NH, None)), tail.band, self.layout.tensor)
            parts.append(_log_softmax(logits) + head[:, num_tokens + number, None])
        return torch.cat(parts, dim=1).unflatten(0, (x_BSH.shape[0], -1))

    @property
    def _tails(self) -> list[Tail]:
        return cast(list[Tail], self.tails)

    def _enter(self, x_BSH: Tensor) -> Tensor:
        """Enter the tensor-parallel region: the whole sequence on every rank, its gradients summed over them."""
        if self.layout.sequence_parallel:
            return gather_from_sequence(x_BSH, self.layout.tensor)
        return copy_to_tensor_group(x_BSH, self.layout.tensor)

    def _head_labels(self, labels_N: Tensor) -> Tensor:
        """Return each label's column of the head: bands first, tokens behind them; an ignored label stays as it is."""
        columns_N = torch.where(labels_N >= 0, labels_N + len(self.tails), labels_N)
        for number, tail in enumerate(self._tails):
            columns_N = columns_N.masked_fill(tail.contains(labels_N), number)
        return columns_N


class Head(nn.Module):
    """The frequent tokens, and a class for each later band."""

    def __init__(self, band: AdaptiveBand, num_tails: int, tied: BandEmbedding | None, *, group: Group) -> None:
        super().__init__()
        self.band = band
        self.num_tails = num_tails
        self.group = group
        self.weight = _tied_or_new_table(band, tied, group)
        self.band_weight = nn.Parameter(torch.empty(num_tails, band.width))
        set_init(self.band_weight, Normal(xavier_std(band.width, num_tails)))

    def forward(self, x_NH: Tensor, columns_N: Tensor) -> Tensor:
        """Return the loss of each column, fp32 [N]."""
        return in_chunks(self._losses, x_NH, columns_N)

    def _losses(self, x_NH: Tensor, columns_N: Tensor) -> Tensor:
        # Bands stand before the tokens, on the first rank, because padding stands behind them. The other ranks compute
        # theirs all the same, and drop them: every rank takes part when their gradient is summed.
        band_logits_NT = self.band_logits(x_NH)[:, : self.num_tails if self.group.rank == 0 else 0]
        rows = len(self.weight)
        return vocab_parallel_cross_entropy(
            torch.cat([band_logits_NT, self.token_logits(x_NH)], dim=1),
            columns_N,
            group=self.group,
            vocab_size=self.num_tails + self.band.size,
            vocab_start=self.num_tails + self.group.rank * rows if self.group.rank else 0,
            overwrite_logits=True,
        )

    def token_logits(self, x_NH: Tensor) -> Tensor:
        """Return the logits of this rank's tokens, [N, V]."""
        return parallel_lm_logits(x_NH, self.weight, layout=WHOLE)

    def band_logits(self, x_NH: Tensor) -> Tensor:
        """Return the logits of the later bands, [N, T]."""
        return linear(x_NH, use_replicated_param(self.band_weight, self.group).to(x_NH.dtype))


class Tail(nn.Module):
    """The tokens of one later band: H is projected to its width, then compared with its table."""

    def __init__(
        self, model: ModelConfig, number: int, band: AdaptiveBand, tied: BandEmbedding | None, *, group: Group
    ) -> None:
        super().__init__()
        self.band = band
        self.group = group
        self.site = Site.of_band(number)
        # Inside the tensor-parallel region, but before the table is cut: all ranks hold the same numbers.
        self.dropout = ResidualDropout(model.adaptive_softmax_dropout, OUTSIDE_BLOCKS, layout=Layout(group))
        self.weight = _tied_or_new_table(band, tied, group)
        if tied is None:
            self.projection = nn.Parameter(torch.empty(model.hidden_size, band.width))
            set_init(self.projection, Normal(xavier_std(band.width, model.hidden_size)))
        else:
            self.projection = tied.projection.weight

    def forward(self, x_MH: Tensor, labels_M: Tensor, micro_batch_key: int | None) -> Tensor:
        """Return the loss of each token among those of the band, fp32 [M]; labels count from its first token."""
        return in_chunks(self._losses, self.narrow(x_MH, micro_batch_key), labels_M)

    def contains(self, labels_N: Tensor) -> Tensor:
        """Return which tokens are of this band."""
        return (labels_N >= self.band.start) & (labels_N < self.band.stop)

    def narrow(self, x_MH: Tensor, micro_batch_key: int | None) -> Tensor:
        """Return [M, D]."""
        projection = use_replicated_param(self.projection, self.group).to(x_MH.dtype)
        return self.dropout(matmul(x_MH, projection), self.site, micro_batch_key)

    def logits(self, x_MD: Tensor) -> Tensor:
        """Return the logits of this rank's tokens, [M, V]."""
        return parallel_lm_logits(x_MD, self.weight, layout=WHOLE)

    def _losses(self, x_MD: Tensor, labels_M: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(
            self.logits(x_MD),
            labels_M,
            group=self.group,
            vocab_size=self.band.size,
            vocab_start=self.group.rank * len(self.weight),
            overwrite_logits=True,
        )


def _tied_or_new_table(band: AdaptiveBand, tied: BandEmbedding | None, group: Group) -> nn.Parameter:
    if tied is not None:
        return tied.table.weight
    spec = ShardSpec(dim=0, full_size=band.size, padding=band.padded_size(group.size) - band.size)
    weight = nn.Parameter(torch.empty(spec.local_size(group.size), band.width))
    set_shard_spec(weight, spec)
    set_init(weight, Normal(xavier_std(band.width, band.size)))
    return weight


def _whole(logits_NV: Tensor, band: AdaptiveBand, group: Group) -> Tensor:
    return all_gather_raw(logits_NV, group, dim=1)[:, : band.size]


def _log_softmax(logits_NV: Tensor) -> Tensor:
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).log_softmax(dim=1)
