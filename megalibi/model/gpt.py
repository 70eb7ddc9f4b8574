"""The GPT: embedding, blocks, norm, output layer. Read it from the top down.

Shapes: B batch, S sequence, H hidden, V vocabulary rows of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalibi.config import ModelConfig
from megalibi.model.block import Block, LayerNorm, ResidualDropout
from megalibi.model.loss import token_losses
from megalibi.model.positions import build_position_method
from megalibi.parallel import Group, ShardSpec, VocabParallelEmbedding, scatter_to_sequence, set_shard_spec


class GPT(nn.Module):
    """A pre-norm decoder that returns the loss of every token. It has no length cap.

    Parameters are allocated here and filled by ``initialize``. They may be stored in a higher precision than the one
    the model computes in: each is cast where it is used.

    Args:
        model: The network.
        padded_vocab_size: Rows of the whole embedding table.
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

        self.embedding = VocabParallelEmbedding(model.vocab_size, padded_vocab_size, model.hidden_size, group=group)
        self.positions = build_position_method(model, group)
        self.dropout = ResidualDropout(model.dropout, -1, **parallel)
        self.blocks = nn.ModuleList(
            Block(model, layer, self.positions, **parallel) for layer in range(model.num_layers)
        )
        self.final_norm = LayerNorm(model, **parallel)
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
            cu_seqlens: int32 document boundaries over the B * S tokens, which attention does not cross.
            micro_batch_key: Keys dropout; None: no dropout.
        """
        x_BSH = self.positions.add_to_embedding(self.embedding(tokens_BS, self.compute_dtype))
        if self.sequence_parallel:
            x_BSH = scatter_to_sequence(x_BSH, self.group)
        x_BSH = self.dropout(x_BSH, "embedding", micro_batch_key)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                # Dropout is keyed, so there is no random state to put back for the second forward pass.
                x_BSH = checkpoint(
                    block, x_BSH, cu_seqlens, micro_batch_key, use_reentrant=True, preserve_rng_state=False
                )
            else:
                x_BSH = block(x_BSH, cu_seqlens, micro_batch_key)
        return self.output(self.final_norm(x_BSH), labels_BS)


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

    def forward(self, x_BSH: Tensor, labels_BS: Tensor) -> Tensor:
        """Return the loss of each token, fp32 [B, S]."""
        return token_losses(
            x_BSH,
            self.weight,
            labels_BS,
            group=self.group,
            vocab_size=self.vocab_size,
            vocab_start=self.vocab_start,
            sequence_parallel=self.sequence_parallel,
        )
