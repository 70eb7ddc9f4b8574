"""The GPT: embedding, blocks, norm, output layer. Read it from the top down.

Shapes: B batch, S sequence, H hidden, V vocabulary rows of this rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alibi_attention import PackedDocuments
from megalibi.config import ModelConfig
from megalibi.model.block import Block, LayerNorm, ResidualDropout
from megalibi.model.positions import build_position_method
from megalibi.model.vocabulary.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from megalibi.model.vocabulary.loss import token_losses
from megalibi.parallel import (
    Group,
    ShardSpec,
    VocabParallelEmbedding,
    all_gather_raw,
    parallel_lm_logits,
    scatter_to_sequence,
    set_shard_spec,
)


class GPT(nn.Module):
    """A pre-norm decoder that returns the loss of every token. It has no length cap.

    Parameters are allocated here and filled by ``initialize``. They may be stored in a higher precision than the one
    the model computes in: each is cast where it is used.

    Args:
        model: The network.
        padded_vocab_size: Rows of the whole embedding table; adaptive bands are padded each on its own.
        group: The tensor group that shares the layers.
        sequence_parallel: Cut the activations between the layers along the sequence.
        compute_dtype: Of the activations.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        padded_vocab_size: int,
        group: Group,
        sequence_parallel: bool = False,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.vocab_size = model.vocab_size
        self.group = group
        self.sequence_parallel = sequence_parallel and group.size > 1
        self.compute_dtype = compute_dtype
        self.recompute = model.recompute == "full"
        parallel: dict[str, Any] = {"group": group, "sequence_parallel": self.sequence_parallel}

        self.embedding: VocabParallelEmbedding | AdaptiveEmbedding
        self.output: OutputLayer | AdaptiveSoftmax
        if model.adaptive_cutoffs:
            self.embedding = AdaptiveEmbedding(model, group=group)
        else:
            self.embedding = VocabParallelEmbedding(model.vocab_size, padded_vocab_size, model.hidden_size, group=group)
        self.positions = build_position_method(model, group)
        self.dropout = ResidualDropout(model.dropout, -1, **parallel)
        self.blocks = nn.ModuleList(
            Block(model, layer, self.positions, **parallel) for layer in range(model.num_layers)
        )
        self.final_norm = LayerNorm(model, **parallel) if model.final_norm else nn.Identity()
        if isinstance(self.embedding, AdaptiveEmbedding):
            self.output = AdaptiveSoftmax(model, self.embedding, **parallel)
        else:
            self.output = OutputLayer(model, padded_vocab_size, self.embedding, **parallel)

    def forward(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        micro_batch_key: int | None = None,
    ) -> Tensor:
        """Return the cross entropy of each token in nats, fp32 [B, S], the same on every rank of the tensor group.

        Args:
            tokens_BS: Token ids.
            labels_BS: The next token's ids; -100 where there is no loss.
            cu_seqlens: int32 document boundaries over the B * S tokens, which attention does not cross; on the host, or
                reading them waits for the device.
            micro_batch_key: Keys dropout; None: no dropout.
        """
        return self.output(self._last_hidden(tokens_BS, cu_seqlens, micro_batch_key), labels_BS, micro_batch_key)

    @torch.no_grad()
    def log_probs(self, tokens_BS: Tensor, *, first: int = 0) -> Tensor:
        """Return the log-probability of every next token, fp32 [B, S - first, V], the same on the whole tensor group.

        It takes the memory that ``forward`` avoids: what needs the loss alone should not ask for it.

        Args:
            tokens_BS: Token ids.
            first: The first position to predict from; not under sequence parallelism.
        """
        assert first == 0 or not self.sequence_parallel
        return self.output.log_probs(self._last_hidden(tokens_BS, None, None)[:, first:])

    def _last_hidden(self, tokens_BS: Tensor, cu_seqlens: Tensor | None, micro_batch_key: int | None) -> Tensor:
        """Return what the output layer reads, [B, S, H]; under sequence parallelism this rank's part of it."""
        x_BSH = self.positions.add_to_embedding(self.embedding(tokens_BS, self.compute_dtype))
        if self.sequence_parallel:
            x_BSH = scatter_to_sequence(x_BSH, self.group)
        x_BSH = self.dropout(x_BSH, "embedding", micro_batch_key)
        bias = self.positions.score_bias(tokens_BS.shape[1], x_BSH.device)
        documents = None if cu_seqlens is None else PackedDocuments(cu_seqlens, tokens_BS.numel(), x_BSH.device)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                # Dropout is keyed, so there is no random state to put back for the second forward pass.
                forward = partial(block, documents=documents)
                x_BSH = checkpoint(forward, x_BSH, micro_batch_key, *bias, use_reentrant=True, preserve_rng_state=False)
            else:
                x_BSH = block(x_BSH, micro_batch_key, *bias, documents=documents)
        return self.final_norm(x_BSH)


class OutputLayer(nn.Module):
    """Logits over this rank's part of the vocabulary, and from them the losses.

    A tied weight is held here as well as in the embedding, one parameter under two names, so that ZeRO 3 finds it
    before either use.
    """

    def __init__(
        self,
        model: ModelConfig,
        padded_vocab_size: int,
        embedding: VocabParallelEmbedding,
        *,
        group: Group,
        sequence_parallel: bool,
    ) -> None:
        super().__init__()
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.vocab_size = model.vocab_size
        self.vocab_start = embedding.vocab_start
        if model.tie_embeddings:
            self.weight = embedding.weight
        else:
            spec = ShardSpec(dim=0, full_size=model.vocab_size, padding=padded_vocab_size - model.vocab_size)
            self.weight = nn.Parameter(torch.empty(spec.local_size(group.size), model.hidden_size))
            set_shard_spec(self.weight, spec)

    def forward(self, x_BSH: Tensor, labels_BS: Tensor, micro_batch_key: int | None = None) -> Tensor:
        """Return the loss of each token, fp32 [B, S]; nothing is dropped here."""
        return token_losses(
            x_BSH,
            self.weight,
            labels_BS,
            group=self.group,
            vocab_size=self.vocab_size,
            vocab_start=self.vocab_start,
            sequence_parallel=self.sequence_parallel,
        )

    @torch.no_grad()
    def log_probs(self, x_BSH: Tensor) -> Tensor:
        """Return the log-probability of every token of the vocabulary, fp32 [B, S, V], the same on every rank."""
        parallel: dict[str, Any] = {"group": self.group, "sequence_parallel": self.sequence_parallel}
        logits_BSV = all_gather_raw(parallel_lm_logits(x_BSH, self.weight, **parallel), self.group, dim=2)
        return logits_BSV[..., : self.vocab_size].float().log_softmax(-1)
