"""Bytes and FLOP by part, against counts by hand."""

from __future__ import annotations

import pytest
import torch

from fused_ops.layer_norm import MAX_WIDTH
from megalibi.config import Config, derive
from megalibi.model import model_flops_per_token, recomputed_flops_per_token
from megalibi.plan.roofline import trace_work
from megalibi.plan.work_trace import PRODUCTS, Work, WorkTrace, count_kernel
from tests.support.steps import make_config

LAYERS, HIDDEN, FFN, VOCABULARY, HEADS = 2, 256, 1024, 2048, 8  # of make_config
BATCH, LENGTH = 2, 96
TOKENS = BATCH * LENGTH
BF16, FP32 = 2, 4
STREAM = TOKENS * HIDDEN * BF16
NUMBERS_OF_A_TOKEN = 400
"""Bytes that the cross entropy moves for a token beside the logits: maxima, sums, labels, masks."""


def config(**sections: dict[str, object]) -> Config:
    """The small model on two sequences."""
    train = {"micro_batch_size": BATCH, "global_batch_size": BATCH} | sections.pop("train", {})
    return make_config(**{"zero": {"stage": 1}, "data": {"seq_length": LENGTH}, **sections, "train": train})


def work_of(run: Config, ranks: int = 1, attention: str = "fused") -> dict[str, Work]:
    return trace_work(run, derive(run, ranks), attention=attention)


def product(rows: int, inner: int, columns: int) -> tuple[float, float]:
    """FLOP and bytes of a matrix product and its two gradients: each takes two of three matrices, makes the third."""
    return 3 * 2.0 * rows * inner * columns, 3.0 * BF16 * (rows * inner + inner * columns + rows * columns)


def test_products_of_the_blocks_by_hand() -> None:
    parts = work_of(config())
    shapes = {"qkv": (HIDDEN, 3 * HIDDEN), "projection": (HIDDEN, HIDDEN), "up": (HIDDEN, FFN), "down": (FFN, HIDDEN)}
    for name, (inner, columns) in shapes.items():
        flops, moved = product(TOKENS, inner, columns)
        assert (parts[name].flops, parts[name].bytes) == (LAYERS * flops, LAYERS * moved), name
    assert (parts["logits"].flops, parts["logits"].bytes) == product(TOKENS, HIDDEN, VOCABULARY)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("bias", [False, True])
def test_fused_norms_and_residual_adds_by_hand(bias: bool, recompute: str) -> None:
    # The norm of the embedding is as the last one: no stream beside it, and not computed again.
    parts = work_of(config(model={"bias": bias, "recompute": recompute, "embedding_norm": bias}))
    again = 2 if recompute == "full" else 1
    beside = (2 if bias else 1) * HIDDEN * BF16 + 2 * TOKENS * FP32  # weights, and a mean and a deviation of each token
    # Before attention: read and written; the gradients of norm and stream and the norm's input read, one written.
    before_attention = again * (2 * STREAM + beside) + 4 * STREAM
    # Before the feed-forward layer the sum too: both summands read, it and the norm written.
    before_mlp = again * (4 * STREAM + beside) + 4 * STREAM
    last = 2 * STREAM + beside + 3 * STREAM  # it has no stream beside it, and is not computed again
    alone = 2 if bias else 1
    gradients = (2 * LAYERS + alone) * (
        beside + HIDDEN * BF16
    )  # of the weights; a gradient of the biases for the biases
    assert parts["layer norm"] == Work(0.0, LAYERS * (before_attention + before_mlp) + alone * last + gradients)
    assert parts["residual add"] == Work(0.0, LAYERS * again * 3 * STREAM)  # at the end of a block


def test_norms_too_wide_for_the_kernels_by_hand() -> None:
    width = MAX_WIDTH + HEADS
    assert set(work_of(config(model={"hidden_size": MAX_WIDTH}))) == set(work_of(config()))
    parts = work_of(config(model={"hidden_size": width}))
    stream, weights, statistics = TOKENS * width * BF16, width * BF16, 2 * TOKENS * FP32
    norm = (2 * stream + weights + statistics) + (3 * stream + 2 * weights + statistics)  # forward, backward
    # Within the norm before the feed-forward layer the sum forward; autograd adds the gradients up, twice a layer.
    assert parts["layer norm"] == Work(0.0, (2 * LAYERS + 1) * norm + LAYERS * 3 * stream)
    assert parts["residual add"] == Work(0.0, LAYERS * (1 + 2) * 3 * stream)


def test_what_else_moves_memory_by_hand() -> None:
    parts = work_of(config())
    assert parts["activation"] == Work(0.0, LAYERS * (2 + 3) * TOKENS * FFN * BF16)
    logits = TOKENS * VOCABULARY * BF16  # read; then read and written
    beside = parts["cross entropy"].bytes - (1 + 2) * logits
    assert 0 < beside < NUMBERS_OF_A_TOKEN * TOKENS


def test_gradients_of_q_k_and_v_are_put_together_unless_attention_has() -> None:
    assert "split, rotary" not in work_of(config())  # our kernels write them into one tensor
    others = config(model={"position_method": "sinusoidal"})
    assert work_of(others)["split, rotary"] == Work(0.0, LAYERS * (3 + 3) * STREAM)
    unfused = work_of(others, attention="unfused")["split, rotary"]
    assert unfused == Work(0.0, LAYERS * (3 + 3 + 2) * STREAM)  # its output is made dense too


def test_a_fused_kernel_by_hand() -> None:
    head_dim = HIDDEN // HEADS
    product = 2 * BATCH * HEADS * head_dim * sum(range(1, LENGTH + 1))  # query i sees i keys
    tensor, rows = TOKENS * HIDDEN * BF16, TOKENS * HEADS * FP32
    parts = work_of(config())
    assert parts["attention"] == Work(LAYERS * (2 + 5) * product, LAYERS * ((4 + 8) * tensor + 2 * rows))
    forward, backward = count_kernel(torch.empty(BATCH, LENGTH, HEADS, head_dim, dtype=torch.bfloat16, device="meta"))
    assert (forward.flops, backward.flops) == (2 * product, 5 * product)


def products_of(parts: dict[str, Work]) -> float:
    """FLOP without what the kernel computes again: two of its seven products are the forward pass's once more."""
    kernel = parts.get("attention", Work()).flops * 6 / 7
    return kernel + sum(work.flops for name, work in parts.items() if name in PRODUCTS)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_products_are_the_models_flops(recompute: str) -> None:
    run = config(model={"recompute": recompute})
    causal, full = (model_flops_per_token(run.model, LENGTH, causal=is_causal) for is_causal in (True, False))
    again = recomputed_flops_per_token(run.model, LENGTH)
    if recompute == "none":
        assert products_of(work_of(run)) == TOKENS * causal
    assert products_of(work_of(run, attention="unfused")) == TOKENS * (full + again)  # it computes the future too


def test_recomputation_runs_the_blocks_forward_once_more_and_the_rest_not() -> None:
    once, twice = (work_of(config(model={"recompute": recompute})) for recompute in ("none", "full"))
    for name in ("qkv", "projection", "up", "down"):
        assert twice[name].flops == pytest.approx(once[name].flops * 4 / 3)
    assert twice["attention"].flops == once["attention"].flops * 9 / 7
    assert twice["logits"] == once["logits"]
    assert twice["activation"].bytes == once["activation"].bytes * 7 / 5


def test_padding_of_the_vocabulary_is_computed() -> None:
    run = config(model={"vocab_size": VOCABULARY - 50})
    extra = products_of(work_of(run)) - TOKENS * model_flops_per_token(run.model, LENGTH, causal=True)
    assert extra == 6 * 50 * HIDDEN * TOKENS


def test_tensor_ranks_share_the_products() -> None:
    whole = work_of(config())
    halves = work_of(config(parallel={"tensor_parallel_size": 2}), ranks=2)
    assert products_of(halves) == products_of(whole) / 2
    assert halves["layer norm"] == whole["layer norm"]
    cut = work_of(config(parallel={"tensor_parallel_size": 2, "sequence_parallel": True}), ranks=2)
    assert cut["qkv"].flops == halves["qkv"].flops
    assert cut["residual add"].bytes == whole["residual add"].bytes / 2


@pytest.mark.parametrize(
    "model",
    [{}, {"bias": True, "tie_embeddings": False}, {"position_method": "t5_bias"}, {"recompute": "full"},
     {"dropout": 0.1}, {"adaptive_cutoffs": [400, 1200]}],
)  # fmt: skip
def test_no_work_is_lost_between_the_parts(model: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(model=model)
    parts = work_of(run)
    monkeypatch.setattr(WorkTrace, "_scope_of", lambda *_: "outside")
    whole = work_of(run)
    assert set(whole) == {"other", "layer norm", "cross entropy"} | ({"attention"} & set(parts))  # kernels have parts
    for name in ("flops", "bytes"):
        totals = [sum(getattr(work, name) for work in part.values()) for part in (parts, whole)]
        assert totals[0] == pytest.approx(totals[1], rel=1e-12)
    assert parts["other"].bytes < 0.001 * totals[0]  # the seed of the backward pass


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def index(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int64)


OPERATIONS = {
    "a product": (lambda: empty(3, 5) @ empty(5, 7), 2 * 3 * 5 * 7, 4 * (15 + 35 + 21)),
    "an expanded operand is read once": (lambda: empty(4, 6) + empty(4, 1).expand(4, 6), 0, 4 * (24 + 4 + 24)),
    "the same tensor twice is read once": (lambda: (x := empty(8)) * x, 0, 4 * (8 + 8)),
    "a view": (lambda: empty(4, 6).t().flatten(0, 0)[1:].unsqueeze(0).detach(), 0, 0),
    "an allocation": (lambda: empty(4, 6), 0, 0),
    "a constant": (lambda: torch.zeros(4, 6, device="meta"), 0, 4 * 24),
    "in place": (lambda: empty(8).add_(empty(8)), 0, 4 * (8 + 8 + 8)),
    "a copy": (lambda: empty(8).copy_(empty(8, dtype=torch.bfloat16)), 0, 2 * 8 + 4 * 8),
    "a part is filled": (lambda: empty(4, 6)[:, 4:].fill_(0.0), 0, 4 * 8),
    "rows are looked up": (lambda: torch.embedding(empty(1000, 6), index(3)), 0, 8 * 3 + 4 * 2 * 18),
    "elements are gathered": (lambda: empty(4, 1000).gather(1, index(4, 1)), 0, 8 * 4 + 4 * 2 * 4),
    "elements are added": (lambda: empty(4, 1000).scatter_add_(1, index(4, 1), empty(4, 1)), 0, 8 * 4 + 4 * 3 * 4),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_by_hand(name: str) -> None:
    run, flops, moved = OPERATIONS[name]
    trace = WorkTrace()
    with trace:
        run()
    work = trace.parts.get("other", Work())
    assert (work.flops, work.bytes) == (flops, moved)
