"""The GPT: embedding, blocks, norm, output layer. Read it from the top down.

Shapes: B batch, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alibi_attention import PackedDocuments
from megalibi.config import ModelConfig
from megalibi.model.block import Block
from megalibi.model.cache import KeyValueCache
from megalibi.model.dropout import OUTSIDE_BLOCKS, ResidualDropout, Site
from megalibi.model.layers import LayerNorm
from megalibi.model.positions import Alibi, ScoreBias, build_position_method
from megalibi.model.vocabulary import build_embedding, build_output
from megalibi.parallel import Layout, scatter_to_sequence


class GPT(nn.Module):
    """A pre-norm decoder that returns the loss of every token. Sequences may have any length.

    Parameters are allocated here and filled by ``initialize``. They may be stored in a higher precision than the one
    the model computes in: each is cast where it is used.

    Args:
        model: The network.
        padded_vocab_size: Rows of the whole embedding table; adaptive bands are padded each on its own.
        layout: How the ranks share the layers and the activations between them.
        compute_dtype: The type of the activations.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        padded_vocab_size: int,
        layout: Layout,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.vocab_size = model.vocab_size
        self.layout = layout
        self.compute_dtype = compute_dtype
        self.recompute = model.recompute == "full"

        self.embedding = build_embedding(model, padded_vocab_size, layout.tensor)
        self.embedding_norm = LayerNorm(model, layout=layout) if model.embedding_norm else nn.Identity()
        self.positions = build_position_method(model, layout.tensor)
        self.dropout = ResidualDropout(model.dropout, OUTSIDE_BLOCKS, layout=layout)
        self.blocks = nn.ModuleList(
            Block(model, layer, self.positions, layout=layout) for layer in range(model.num_layers)
        )
        self.final_norm = LayerNorm(model, layout=layout) if model.final_norm else nn.Identity()
        self.output = build_output(model, padded_vocab_size, self.embedding, layout)

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
            labels_BS: The next token's ids; IGNORED_LABEL where there is no loss.
            cu_seqlens: int32 document boundaries over the B * S tokens, which attention does not cross; on the host, or
                reading them waits for the device.
            micro_batch_key: Keys dropout; None: no dropout.
        """
        x_BSH = self._last_hidden(tokens_BS, cu_seqlens, micro_batch_key)
        return self.output(x_BSH, labels_BS, micro_batch_key)

    @torch.no_grad()
    def log_probs(self, tokens_BS: Tensor, *, first: int = 0) -> Tensor:
        """Return the log-probability of every next token, fp32 [B, S - first, V], the same on the whole tensor group.

        It takes the memory that ``forward`` avoids: call ``forward`` where the loss is enough.

        Args:
            tokens_BS: Token ids.
            first: The first position to predict from; must be 0 under sequence parallelism.
        """
        assert first == 0 or not self.layout.sequence_parallel
        return self.output.log_probs(self._last_hidden(tokens_BS, None, None)[:, first:])

    @torch.no_grad()
    def next_log_probs(self, tokens_BS: Tensor, caches: Sequence[KeyValueCache]) -> Tensor:
        """Return the log-probability of the token after these, fp32 [B, V], the same on the whole tensor group.

        Args:
            tokens_BS: The tokens that follow those of each row's cache.
            caches: For each row the keys and values of the tokens before, however many, which gets those of these.
        """
        assert not self.layout.sequence_parallel
        return self.output.log_probs(self._last_hidden(tokens_BS, None, None, caches)[:, -1:])[:, 0]

    def scale_slopes(self, factor: float) -> None:
        """Multiply the slopes of ALiBi by this from now on: 1 is as in training; the model has no other positions."""
        assert isinstance(self.positions, Alibi)
        self.positions.scale_slopes(factor)

    def _last_hidden(
        self,
        tokens_BS: Tensor,
        cu_seqlens: Tensor | None,
        micro_batch_key: int | None,
        caches: Sequence[KeyValueCache] = (),
    ) -> Tensor:
        """Return what the output layer reads, [B, S, H]; under sequence parallelism this rank's part of it."""
        first = [cache.num_tokens for cache in caches] or [0]
        x_BSH = self.positions.add_to_embedding(self.embedding(tokens_BS, self.compute_dtype), first=first)
        if self.layout.sequence_parallel:
            x_BSH = scatter_to_sequence(x_BSH, self.layout.tensor)
        x_BSH = self.embedding_norm(x_BSH)  # no position method has added to the embedding if there is a norm
        x_BSH = self.dropout(x_BSH, Site.EMBEDDING, micro_batch_key)
        bias = self.positions.score_bias(max(first) + tokens_BS.shape[1], x_BSH.device)
        documents = None if cu_seqlens is None else PackedDocuments(cu_seqlens, tokens_BS.numel(), x_BSH.device)
        for number, block in enumerate(self.blocks):
            if caches:
                x_BSH = block(x_BSH, None, bias, caches=[cache.layers[number] for cache in caches])
            elif self.recompute and torch.is_grad_enabled():
                x_BSH = _run_and_recompute(block, x_BSH, micro_batch_key, bias, documents)
            else:
                x_BSH = block(x_BSH, micro_batch_key, bias, documents=documents)
        return self.final_norm(x_BSH)


def _run_and_recompute(
    block: nn.Module, x_BSH: Tensor, micro_batch_key: int | None, bias: ScoreBias, documents: PackedDocuments | None
) -> Tensor:
    """Run a block and keep nothing but its input: the backward pass runs it again.

    Reentrant checkpointing finds only tensors that are arguments themselves, so the fields of the bias travel one by
    one. The non-reentrant kind would spare us that, but ZeRO 3 forbids it (DeepSpeed 0.19.8, torch 2.13): it runs the
    block again in the middle of the backward pass of the block's last layer. DeepSpeed has gathered that layer's weight
    by then, and its forward hook releases it when the second run leaves the layer. The gradient then meets a weight of
    shape (0,), and the backward pass fails: "The size of tensor a (0) must match the size of tensor b (96)".
    """

    def forward(x_BSH: Tensor, *bias_fields: Tensor | None) -> Tensor:
        return block(x_BSH, micro_batch_key, ScoreBias(*bias_fields), documents=documents)

    # Dropout is keyed, so there is no random state to put back for the second run.
    return checkpoint(forward, x_BSH, *bias, use_reentrant=True, preserve_rng_state=False)
