"""One table for the whole vocabulary, cut over the tensor group along its rows: the embedding and the output layer.

Shapes: B batch, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalibi.config import ModelConfig
from megalibi.model.init import Normal, set_init
from megalibi.model.vocabulary.loss import token_losses
from megalibi.parallel import (
    Group,
    Layout,
    ShardSpec,
    VocabParallelEmbedding,
    all_gather_raw,
    parallel_lm_logits,
    set_shard_spec,
)


class TableEmbedding(VocabParallelEmbedding):
    """The row of each token.

    Args:
        model: The network.
        padded_vocab_size: Rows of the whole table.
        group: The tensor group.
    """

    def __init__(self, model: ModelConfig, padded_vocab_size: int, *, group: Group) -> None:
        # The whole sequence on every rank, also under sequence parallelism: positions may be added to it.
        super().__init__(model.vocab_size, padded_vocab_size, model.hidden_size, layout=Layout(group))
        # With scaled tokens as in fairseq: multiplied by sqrt(H) they have a standard deviation of 1.
        std = model.hidden_size**-0.5 if model.scale_embedding else model.init_std
        set_init(self.weight, Normal(std))


class TableOutput(nn.Module):
    """Logits over this rank's part of the vocabulary, and from them the losses.

    A tied weight is held here as well as in the embedding, one parameter under two names, so that ZeRO 3 finds it
    before either use.

    Args:
        model: The network.
        padded_vocab_size: Rows of the whole table.
        embedding: The embedding, whose weight is used here too if the model ties it.
        layout: How the ranks share the hidden states.
    """

    def __init__(
        self, model: ModelConfig, padded_vocab_size: int, embedding: VocabParallelEmbedding, *, layout: Layout
    ) -> None:
        super().__init__()
        self.layout = layout
        self.vocab_size = model.vocab_size
        self.vocab_start = embedding.vocab_start
        if model.tie_embeddings:
            self.weight = embedding.weight
        else:
            spec = ShardSpec(dim=0, full_size=model.vocab_size, padding=padded_vocab_size - model.vocab_size)
            self.weight = nn.Parameter(torch.empty(spec.local_size(layout.tensor.size), model.hidden_size))
            set_shard_spec(self.weight, spec)
            set_init(self.weight, Normal(model.init_std))

    def forward(self, x_BSH: Tensor, labels_BS: Tensor, micro_batch_key: int | None = None) -> Tensor:
        """Return the loss of each token, fp32 [B, S]; nothing is dropped here, so the key is not used."""
        return token_losses(
            x_BSH,
            self.weight,
            labels_BS,
            layout=self.layout,
            vocab_size=self.vocab_size,
            vocab_start=self.vocab_start,
        )

    @torch.no_grad()
    def log_probs(self, x_BSH: Tensor) -> Tensor:
        """Return the log-probability of every token of the vocabulary, fp32 [B, S, V], the same on every rank."""
        logits_BSV_local = parallel_lm_logits(x_BSH, self.weight, layout=self.layout)
        logits_BSV = all_gather_raw(logits_BSV_local, self.layout.tensor, dim=2)
        return logits_BSV[..., : self.vocab_size].float().log_softmax(-1)
