"""The section ``model``: what the network is."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from megalibi.config.annotations import Fixed, Free, Said
from megalibi.config.checks import check_at_least, check_at_most, check_fraction, check_one_of, refuse

POSITION_METHODS = ("alibi", "sinusoidal", "rotary", "t5_bias", "learned", "none")
ADDED_TO_EMBEDDING = ("sinusoidal", "learned")
"""The position methods that act on the embedded tokens."""
ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
RECOMPUTATIONS = ("none", "full")
MAX_LAYERS = 100_000
MAX_WIDTH = 2**24
MAX_ROWS = 2**31 - 1
"""The most rows of a table: Megatron-LM's token files have ids of at most 32 bits."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: a GPT whose layer norms stand before attention and feed-forward layer."""

    num_layers: Fixed[int]
    """The number of transformer blocks."""
    hidden_size: Fixed[int]
    """The width of the residual stream, in elements."""
    num_attention_heads: Fixed[int]
    """The number of attention heads of the whole model. It must divide hidden_size, and tensor_parallel_size must
    divide it; it need not be a power of two."""
    ffn_hidden_size: Fixed[int]
    """The width of the feed-forward layer, in elements; 4 x hidden_size in the models of arXiv:2108.12409."""
    vocab_size: Fixed[int]
    """The number of token ids: all ids are below it. It must be at least the tokenizer's vocabulary size."""
    padded_vocab_size: Fixed[int] = 0
    """The rows of the embedding table; 0 takes the next multiple of 128 x tensor_parallel_size. Rows past vocab_size
    never get any probability. A fixed number keeps one table size over several tensor_parallel_size."""
    position_method: Fixed[str] = "alibi"
    """How the model knows the order of tokens: alibi (arXiv:2108.12409), sinusoidal (arXiv:1706.03762, section 3.5),
    rotary (arXiv:2104.09864), t5_bias (arXiv:1910.10683, section 2.1), learned (a row for every position) or none."""
    max_position_embeddings: Fixed[int] = 0
    """The rows of the table of learned positions, and so the most tokens that such a model sees at once. Only learned
    needs it; no other method has a length cap."""
    t5_num_buckets: Fixed[int] = 32
    """The number of distance buckets of t5_bias, 32 as in T5; the first half of them hold one distance each."""
    t5_max_distance: Fixed[int] = 128
    """The distance in tokens, 128 as in T5, from which on all distances share the last bucket of t5_bias."""
    t5_bias_scale: Fixed[float] = 1.0
    """What the learned numbers of t5_bias are multiplied by, and so how fast they learn: the optimizer moves all
    parameters at one rate, at which these are still small after hundreds of steps."""
    scale_alibi: Fixed[bool] = False
    """Whether the slopes of alibi are divided by sqrt(head dimension): Falcon-RW scales q.k and the bias together. The
    paper's ALiBi scales q.k alone."""
    scale_embedding: Fixed[bool] = False
    """Whether embedded tokens are multiplied by sqrt(hidden_size) before sinusoidal positions of amplitude 1 are added
    (arXiv:1706.03762, sections 3.4 and 3.5; the code of arXiv:2108.12409). The table then starts with a standard
    deviation of 1 / sqrt(hidden_size), as in fairseq. Without it tokens stay as they are, and the positions have the
    amplitude init_std. An adaptive embedding is multiplied in any case."""
    sinusoidal_amplitude: Fixed[float | None] = None
    """The amplitude of sinusoidal positions; null takes init_std, or 1 where tokens are multiplied by
    sqrt(hidden_size). Beside a table that is too large the tokens are not heard, beside one that is too small the
    positions are not, and the model learns as one without positions."""
    activation: Fixed[str] = "gelu"
    """The activation of the feed-forward layer: gelu (the exact one, by erf), gelu_tanh (its approximation by tanh,
    arXiv:1606.08415, section 2, as in Bloom) or relu."""
    bias: Fixed[bool] = False
    """Whether linear layers have biases, and layer norms too unless norm_bias says otherwise. Without them the model
    exports exactly to ALiBi formats that have none."""
    norm_bias: Fixed[bool | None] = None
    """Whether layer norms have biases; null takes what bias says. Falcon-RW's norms have them in any case."""
    embedding_norm: Fixed[bool] = False
    """Whether a layer norm stands between the token embedding and the first block, as in Bloom. No position method may
    add to the embedding then."""
    tie_embeddings: Fixed[bool] = True
    """Whether the embedding table is the weight of the output layer too."""
    adaptive_cutoffs: Fixed[tuple[int, ...]] = ()
    """The token ids at which the vocabulary, sorted by falling frequency, is cut into the bands of an adaptive
    embedding (arXiv:1809.10853) and softmax (arXiv:1609.04309); 20000 and 60000 for WikiText-103. An empty list keeps
    one table for all tokens."""
    adaptive_factor: Fixed[int] = 4
    """The factor by which the rows of each adaptive band are narrower than those of the band before, 4 as in
    arXiv:1809.10853."""
    final_norm: Fixed[bool] = True
    """Whether a layer norm stands between the last block and the output layer."""
    dropout: Said[float] = 0.0
    """The probability of dropping an element after the embedding, of the attention probabilities, and before each
    residual sum."""
    attention_dropout: Said[float | None] = None
    """The probability of dropping an attention probability; null takes that of dropout."""
    activation_dropout: Said[float] = 0.0
    """The probability of dropping an element after the activation of the feed-forward layer."""
    adaptive_softmax_dropout: Said[float] = 0.0
    """The probability of dropping an element before the adaptive softmax, and of the narrow hidden states of its later
    bands."""
    attention_backend: Said[str] = "auto"
    """The back end of alibi_attention, as `python -m alibi_attention` lists them; auto takes the best that can run."""
    layer_norm_epsilon: Fixed[float] = 1e-5
    """The number added to the variance in layer norms; 1e-5 is PyTorch's default."""
    init_std: Fixed[float] = 0.02
    """The standard deviation of initial weights; layers that write to the residual stream get init_std / sqrt(2 x
    num_layers) (GPT-2, section 2.3). Adaptive tables and projections get theirs from their shapes, as in fairseq."""
    recompute: Free[str] = "none"
    """Which activations are computed again in the backward pass to spare memory: none, or full, where each block keeps
    only its input."""

    def __post_init__(self) -> None:
        """Check what one section can know of itself."""
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
        check_at_least("model", 0, init_std=self.init_std, layer_norm_epsilon=self.layer_norm_epsilon)
        check_at_least("model", 0, t5_bias_scale=self.t5_bias_scale)
        check_at_least("model", 0, sinusoidal_amplitude=self.sinusoidal_amplitude or 0.0)
        if self.hidden_size % self.num_attention_heads:
            refuse(
                "model.num_attention_heads", self.num_attention_heads, f"divide model.hidden_size={self.hidden_size}"
            )
        if self.padded_vocab_size and self.padded_vocab_size < self.vocab_size:
            requirement = f"be 0, which computes it, or at least model.vocab_size={self.vocab_size}"
            refuse("model.padded_vocab_size", self.padded_vocab_size, requirement)
        self._check_positions()
        self._check_adaptive()

    @property
    def multiplies_tokens(self) -> bool:
        """Whether embedded tokens are multiplied by sqrt(hidden_size)."""
        return self.scale_embedding or bool(self.adaptive_cutoffs)

    @property
    def sinusoidal_table_amplitude(self) -> float:
        """The amplitude of sinusoidal positions."""
        if self.sinusoidal_amplitude is not None:
            return self.sinusoidal_amplitude
        return 1.0 if self.multiplies_tokens else self.init_std

    @property
    def attention_dropout_probability(self) -> float:
        """The probability of dropping an attention probability."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def has_norm_bias(self) -> bool:
        """Whether layer norms have biases."""
        return self.bias if self.norm_bias is None else self.norm_bias

    @property
    def head_dim(self) -> int:
        """The width of an attention head, in elements."""
        return self.hidden_size // self.num_attention_heads

    def _check_adaptive(self) -> None:
        cutoffs = self.adaptive_cutoffs
        if any(low >= high for low, high in pairwise((0, *cutoffs, self.vocab_size))):
            requirement = f"be rising numbers between 0 and model.vocab_size={self.vocab_size}"
            refuse("model.adaptive_cutoffs", list(cutoffs), requirement)
        check_at_least("model", 1, adaptive_factor=self.adaptive_factor)
        if self.hidden_size < self.adaptive_factor ** len(cutoffs):
            requirement = (
                f"leave a width of at least 1 to the last of {len(cutoffs) + 1} bands: model.hidden_size="
                f"{self.hidden_size} is divided by it {len(cutoffs)} times"
            )
            refuse("model.adaptive_factor", self.adaptive_factor, requirement)
        if cutoffs and self.padded_vocab_size:
            requirement = "be 0 with model.adaptive_cutoffs, whose bands are padded one by one"
            refuse("model.padded_vocab_size", self.padded_vocab_size, requirement)

    def _check_positions(self) -> None:
        method = self.position_method
        if method == "sinusoidal" and self.hidden_size % 2:
            refuse("model.hidden_size", self.hidden_size, "be even with model.position_method=sinusoidal")
        if self.scale_alibi and method != "alibi":
            refuse("model.scale_alibi", self.scale_alibi, f"be false with model.position_method={method}")
        if self.scale_embedding and method != "sinusoidal":
            refuse("model.scale_embedding", self.scale_embedding, f"be false with model.position_method={method}")
        if self.scale_embedding and self.adaptive_cutoffs:
            requirement = (
                "be false with model.adaptive_cutoffs, whose embedding is multiplied by sqrt(hidden_size) already"
            )
            refuse("model.scale_embedding", self.scale_embedding, requirement)
        if self.embedding_norm and method in ADDED_TO_EMBEDDING:
            requirement = f"be false with model.position_method={method}, which adds positions to the embedding"
            refuse("model.embedding_norm", self.embedding_norm, requirement)
        if method == "rotary" and self.head_dim % 2:
            heads = f"model.num_attention_heads={self.num_attention_heads}"
            requirement = f"be an even multiple of {heads} with model.position_method=rotary"
            refuse("model.hidden_size", self.hidden_size, requirement)
        if (method == "learned") != (self.max_position_embeddings > 0):
            requirement = f"be {'at least 1' if method == 'learned' else '0'} with model.position_method={method}"
            refuse("model.max_position_embeddings", self.max_position_embeddings, requirement)
        check_at_least("model", 2, t5_num_buckets=self.t5_num_buckets)
        check_at_least("model", self.t5_num_buckets // 2 + 1, t5_max_distance=self.t5_max_distance)
