"""The section ``model``: what the network is."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from megalibi.config.checks import check_at_least, check_at_most, check_fraction, check_one_of
from megalibi.errors import ConfigError

POSITION_METHODS = ("alibi", "sinusoidal", "rotary", "t5_bias", "learned", "none")
ACTIVATIONS = ("gelu", "relu")
RECOMPUTATIONS = ("none", "full")
MAX_LAYERS = 100_000
MAX_WIDTH = 2**24
MAX_ROWS = 2**31 - 1
"""Of a table: Megatron-LM's token files have ids of at most 32 bits."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: a pre-norm GPT."""

    num_layers: int
    """Number of transformer blocks."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Attention heads of the whole model; the tensor group divides them. Any count: powers of two are not needed."""
    ffn_hidden_size: int
    """Width of the feed-forward layer; 4 x hidden_size in the paper's models."""
    vocab_size: int
    """Token ids are below this number; at least the tokenizer's."""
    padded_vocab_size: int = 0
    """Rows of the embedding table. 0: the next multiple of 128 x tensor_parallel_size. Padded rows never get
    probability. Fix it to keep one table size over several tensor_parallel_size."""
    position_method: str = "alibi"
    """How the model knows order: alibi (arXiv:2108.12409), sinusoidal (arXiv:1706.03762, section 3.5), rotary
    (arXiv:2104.09864), t5_bias (arXiv:1910.10683, section 2.1), learned (a row for every position) or none."""
    max_position_embeddings: int = 0
    """Rows of learned positions, and so the most tokens that such a model sees at once. Only for learned, which needs
    it; no other method has a length cap."""
    t5_num_buckets: int = 32
    """Buckets of distances of t5_bias; the first half of them hold one distance each."""
    t5_max_distance: int = 128
    """From this distance on all share t5_bias's last bucket."""
    activation: str = "gelu"
    """Of the feed-forward layer: gelu (the exact one, by erf) or relu."""
    bias: bool = False
    """Biases in linear layers and layer norms. Off, the model exports exactly to bias-free ALiBi formats."""
    tie_embeddings: bool = True
    """Use the embedding table as the output layer's weight too."""
    adaptive_cutoffs: tuple[int, ...] = ()
    """Where the vocabulary, sorted by falling frequency, is cut into bands of an adaptive embedding (arXiv:1809.10853)
    and softmax (arXiv:1609.04309); WikiText-103's are 20000 and 60000. Empty: one table for all tokens."""
    adaptive_factor: int = 4
    """Each adaptive band's rows are narrower than those of the band before by this factor."""
    final_norm: bool = True
    """A layer norm between the last block and the output layer."""
    dropout: float = 0.0
    """Probability of dropping after the embedding, on attention probabilities and before each residual sum."""
    attention_dropout: float | None = None
    """The same on attention probabilities alone; none: as ``dropout``."""
    activation_dropout: float = 0.0
    """The same after the activation of the feed-forward layer."""
    adaptive_softmax_dropout: float = 0.0
    """The same before the adaptive softmax, and on the narrow hidden states of its later bands."""
    attention_backend: str = "auto"
    """Back end of alibi_attention; `python -m alibi_attention` lists them. auto takes the best that can run."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in layer norms."""
    init_std: float = 0.02
    """Standard deviation of initial weights; layers that write to the residual stream get init_std / sqrt(2 x layers)
    (GPT-2, section 2.3). Adaptive tables and projections have theirs from their shapes, as in fairseq."""
    recompute: str = "none"
    """Activation checkpointing: none, or full (each block keeps only its input and is computed again in backward)."""

    def __post_init__(self) -> None:
        """Check what one section can know."""
        for name in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "vocab_size"):
            check_at_least("model", 1, **{name: getattr(self, name)})
        check_at_most("model", MAX_LAYERS, num_layers=self.num_layers)
        check_at_most("model", MAX_WIDTH, hidden_size=self.hidden_size, ffn_hidden_size=self.ffn_hidden_size)
        for name in ("vocab_size", "padded_vocab_size", "max_position_embeddings", "t5_num_buckets"):
            check_at_most("model", MAX_ROWS, **{name: getattr(self, name)})
        check_one_of("model", "position_method", self.position_method, POSITION_METHODS)
        check_one_of("model", "activation", self.activation, ACTIVATIONS)
        check_one_of("model", "recompute", self.recompute, RECOMPUTATIONS)
        for name in ("dropout", "attention_dropout", "activation_dropout", "adaptive_softmax_dropout"):
            check_fraction("model", **{name: getattr(self, name) or 0.0})
        check_at_least("model", 0.0, init_std=self.init_std, layer_norm_epsilon=self.layer_norm_epsilon)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.num_attention_heads={self.num_attention_heads} does not divide "
                f"model.hidden_size={self.hidden_size}"
            )
        if self.padded_vocab_size and self.padded_vocab_size < self.vocab_size:
            raise ConfigError(
                f"model.padded_vocab_size={self.padded_vocab_size} is below model.vocab_size={self.vocab_size}: "
                "0 (computed) or at least model.vocab_size is allowed"
            )
        self._check_positions()
        self._check_adaptive()

    @property
    def attention_dropout_probability(self) -> float:
        """What is dropped of attention probabilities."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    def _check_adaptive(self) -> None:
        cutoffs = self.adaptive_cutoffs
        if any(low >= high for low, high in pairwise((0, *cutoffs, self.vocab_size))):
            raise ConfigError(
                f"model.adaptive_cutoffs={list(cutoffs)} is not allowed: rising numbers between 0 and model.vocab_size="
                f"{self.vocab_size} are"
            )
        check_at_least("model", 1, adaptive_factor=self.adaptive_factor)
        if self.hidden_size < self.adaptive_factor ** len(cutoffs):
            raise ConfigError(
                f"model.adaptive_factor={self.adaptive_factor} leaves the last of {len(cutoffs) + 1} bands no width of "
                f"model.hidden_size={self.hidden_size}"
            )
        if cutoffs and self.padded_vocab_size:
            raise ConfigError(
                f"model.padded_vocab_size={self.padded_vocab_size} is not allowed with model.adaptive_cutoffs: each "
                "band is padded on its own; 0 is"
            )

    def _check_positions(self) -> None:
        method, head_dim = self.position_method, self.hidden_size // self.num_attention_heads
        if method == "sinusoidal" and self.hidden_size % 2:
            raise ConfigError(f"model.hidden_size={self.hidden_size} is odd: sinusoidal positions need an even one")
        if method == "rotary" and head_dim % 2:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} over model.num_attention_heads={self.num_attention_heads} is "
                f"{head_dim} a head: rotary positions need an even number"
            )
        if (method == "learned") != (self.max_position_embeddings > 0):
            raise ConfigError(
                f"model.max_position_embeddings={self.max_position_embeddings} with model.position_method={method} is "
                "not allowed: learned needs 1 or more, all others 0"
            )
        check_at_least("model", 2, t5_num_buckets=self.t5_num_buckets)
        check_at_least("model", self.t5_num_buckets // 2 + 1, t5_max_distance=self.t5_max_distance)
