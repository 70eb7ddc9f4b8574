"""By llama.cpp itself: `make test-gguf` builds it; elsewhere these tests are skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make test-gguf")

from megalibi.errors import FileError
from megalibi.export.gguf import metadata
from megalibi.export.gguf.architectures import compute_llama_slopes
from megalibi.export.gguf.llama import tokenize_with_llama
from megalibi.export.gguf.write import convert_to_gguf
from megalibi.export.portable_tokenizer import ODD_TEXTS, SPACE_SIGN
from tests.export.gguf.checkpoints import BLOOM, ROOT, TEXT, load_portable, make_checkpoint

SEQ_LENGTH = 300
BIASES: dict[str, Any] = {"num_attention_heads": 20, "hidden_size": 160, "bias": True, "tie_embeddings": False}
PROBABILITY_BOUNDS = {"f32": 1e-3, "f16": 1e-2, "q8_0": 1e-1}
"""At twice the training length; f16 and q8_0 round the weights."""


@pytest.mark.parametrize("kind", PROBABILITY_BOUNDS)
@pytest.mark.parametrize(
    "model",
    [{"num_attention_heads": 8}, {"num_attention_heads": 12}, BIASES, BLOOM],
    ids=["8", "12", "20_biases", "bloom"],
)
def test_it_computes_the_probabilities_of_the_checkpoint(tmp_path: Path, model: dict[str, Any], kind: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", seq_length=SEQ_LENGTH, **model)
    convert_to_gguf(checkpoint, tmp_path / "m.gguf", load_portable(checkpoint), kind=kind)
    comparison = json.loads((tmp_path / "m.gguf.certificate.json").read_text())["comparison"]
    assert comparison["tokens"] == 2 * SEQ_LENGTH
    assert comparison["largest_probability_difference"] < PROBABILITY_BOUNDS[kind]


def test_other_slopes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", seq_length=SEQ_LENGTH)
    monkeypatch.setattr(metadata, "MAX_ALIBI_BIAS", 7.5)  # and as if llama.cpp made of it what it should not
    monkeypatch.setattr(metadata, "compute_llama_slopes", lambda heads, bias: compute_llama_slopes(heads))
    with pytest.raises(FileError, match="computes other probabilities than the source"):
        convert_to_gguf(checkpoint, tmp_path / "m.gguf", load_portable(checkpoint), kind="f32")
    assert not (tmp_path / "m.gguf").exists()


def test_it_gives_the_same_ids(tmp_path: Path) -> None:
    """The sign U+2581 in a text is a space to llama.cpp."""
    checkpoint = make_checkpoint(tmp_path / "c")
    portable = load_portable(checkpoint)
    convert_to_gguf(checkpoint, tmp_path / "m.gguf", portable, compare=False)
    texts = [*ODD_TEXTS, TEXT, (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")]
    for text, ids in zip(texts, tokenize_with_llama(tmp_path / "m.gguf", texts), strict=True):
        assert ids == portable.tokenizer.encode(text.replace(SPACE_SIGN, " ")), text


def test_other_ids_are_found(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c")
    portable = load_portable(checkpoint)
    portable.model.normalizer_spec.add_dummy_prefix = True
    with pytest.raises(FileError, match=r"llama\.cpp gives the text .* other ids"):
        convert_to_gguf(checkpoint, tmp_path / "m.gguf", portable)
    assert not (tmp_path / "m.gguf").exists()
