from __future__ import annotations

from functools import cache

import numpy as np
import pytest

import tests.support.flash_attn_on_cpu  # noqa: F401 - before alibi_attention; this file is imported in ranks
from alibi_attention import backends
from megalibi.config import Config
from megalibi.data.tokens.token_file import TokenFileWriter
from megalibi.engine.step import StepResult
from megalibi.model import DTYPES
from tests.support.device import DEVICE, ON_GPU
from tests.support.ranks import run_on_ranks
from tests.support.runs import VOCAB_SIZE, Curve, curve_of, largest_relative_difference, make_config, run_ours

RELATIVE_BOUND = {"fp32": 1e-5, "bf16": 3e-3}
"""Of losses and norms; bf16 as between ZeRO stages, where sums in another order flip roundings (test_build.py)."""
STEPS = 4
RANKS = 1 if ON_GPU else 2
HEAD_DIM = 64 if ON_GPU else 24
"""flash-attn may be built for some alone."""
RUNS = [
    (backend.name, precision)
    for backend in backends()
    for precision in RELATIVE_BOUND
    if backend.usable and DEVICE in backend.devices and DTYPES[precision] in backend.dtypes
]

INTERPRETED = {backend.name for backend in backends() if not backend.auto}


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tokens in documents of 1 to 15, so that each sample holds several."""
    random = np.random.default_rng(0)
    prefix = str(tmp_path_factory.mktemp("short") / "tokens")
    with TokenFileWriter(prefix, VOCAB_SIZE) as writer:
        for length in random.integers(1, 16, size=400):
            writer.add_document(random.integers(0, VOCAB_SIZE, size=length))
    return prefix


def _train(configs: list[Config], steps: int) -> list[list[StepResult]]:
    return run_ours(configs, steps)


@cache
def train(prefix: str, backend: str, precision: str, seq_length: int) -> tuple[Curve, Curve]:
    """Without and with a document mask, on two tensor ranks; on one GPU alone."""
    configs = [
        make_config(
            prefix,
            model={
                "attention_backend": backend,
                "num_layers": 1,
                "num_attention_heads": 2,
                "hidden_size": 2 * HEAD_DIM,
                "init_std": 0.2,
            },
            data={"document_mask": document_mask, "seq_length": seq_length},
            parallel={"tensor_parallel_size": RANKS},
            train={"precision": precision, "global_batch_size": 2},
            zero={"stage": 1},
        )
        for document_mask in (False, True)
    ]
    whole, masked = run_on_ranks(RANKS, _train, configs, STEPS)[0]
    return curve_of(whole), curve_of(masked)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "precision"), RUNS)
def test_training_with_every_back_end_gives_the_losses_of_the_reference(
    short_documents: str, backend: str, precision: str
) -> None:
    # Several tiles and blocks, some past a horizon; Triton's interpreter takes its time.
    seq_length = 17 if backend in INTERPRETED else 300
    curves, curves_ref = (train(short_documents, name, precision, seq_length) for name in (backend, "reference"))
    assert largest_relative_difference(*curves_ref) > RELATIVE_BOUND[precision]  # the mask reaches the attention
    for curve, curve_ref in zip(curves, curves_ref, strict=True):
        assert largest_relative_difference(curve, curve_ref) < RELATIVE_BOUND[precision]
