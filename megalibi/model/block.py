"""One block of the GPT: attention and feed-forward, each behind a layer norm and beside the residual stream.

Shapes: B batch, S sequence (this rank's part of it under sequence parallelism), H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from alibi_attention import PackedDocuments
from megalibi.config import ModelConfig
from megalibi.model.attention import SelfAttention
from megalibi.model.cache import LayerCache
from megalibi.model.dropout import ResidualDropout, Site
from megalibi.model.layers import MLP, ResidualNorm
from megalibi.model.positions import PositionMethod, ScoreBias
from megalibi.parallel import Layout


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        model: The network.
        layer: Index of this block.
        positions: The position method, which all blocks share.
        layout: How the ranks share the layers and the activations between them.
    """

    def __init__(self, model: ModelConfig, layer: int, positions: PositionMethod, *, layout: Layout) -> None:
        super().__init__()
        self.attention_norm = ResidualNorm(model, layout=layout)
        self.attention = SelfAttention(model, layer, positions, layout=layout)
        self.mlp_norm = ResidualNorm(model, layout=layout)
        self.mlp = MLP(model, layer, layout=layout)
        self.dropout = ResidualDropout(model.dropout, layer, layout=layout)

    def forward(
        self,
        x_BSH: Tensor,
        micro_batch_key: int | None,
        bias: ScoreBias,
        *,
        documents: PackedDocuments | None = None,
        caches: Sequence[LayerCache] = (),
    ) -> Tensor:
        """Return the residual stream after this block.

        Args:
            x_BSH: The residual stream.
            micro_batch_key: Keys dropout; None: no dropout.
            bias: What is added to the attention scores.
            documents: Attention does not cross their boundaries; None: it sees the whole row. It is given by name:
                ZeRO 3 looks for tensors in what is given by position, and warns of a type that it does not know.
            caches: For each row the keys and values of the tokens before, which gets those of these; none: there were
                no tokens before, and the keys and values are not kept.
        """
        x_BSH, normed_BSH = self.attention_norm(x_BSH)
        y_BSH = self.attention(normed_BSH, micro_batch_key, bias, documents=documents, caches=caches)
        x_BSH, normed_BSH = self.mlp_norm(x_BSH, self.dropout(y_BSH, Site.ATTENTION_OUTPUT, micro_batch_key))
        y_BSH = self.mlp(normed_BSH, micro_batch_key)
        return x_BSH + self.dropout(y_BSH, Site.MLP_OUTPUT, micro_batch_key)
