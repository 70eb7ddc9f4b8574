"""By llama.cpp itself: `make test-gguf` builds it; elsewhere these tests are skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make test-gguf")

from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.errors import FileError
from megalibi.export.gguf import write
from megalibi.export.gguf.llama import tokenize_with_llama
from megalibi.export.gguf.write import convert_to_gguf
from megalibi.export.tokenizer_json import ODD_TEXTS
from tests.export.gguf.checkpoints import BLOOM, ROOT, TEXT, make_checkpoint

SEQ_LENGTH = 300
PROBABILITY_BOUNDS = {"f32": 1e-3, "f16": 1e-2}
"""At twice the training length; f16 rounds the weights."""
SPACE_SIGN = "\u2581"


@pytest.mark.parametrize("kind", PROBABILITY_BOUNDS)
@pytest.mark.parametrize(
    "model", [{"num_attention_heads": 8}, {"num_attention_heads": 12}, BLOOM], ids=["8", "12", "bloom"]
)
def test_it_computes_the_probabilities_of_the_checkpoint(tmp_path: Path, model: dict[str, Any], kind: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", seq_length=SEQ_LENGTH, **model)
    tokenizer = Tokenizer(str(checkpoint.config.data.tokenizer))
    convert_to_gguf(checkpoint, tmp_path / "m.gguf", tokenizer, kind=kind)
    comparison = json.loads((tmp_path / "m.gguf.certificate.json").read_text())["comparison"]
    assert comparison["tokens"] == 2 * SEQ_LENGTH
    assert comparison["largest_probability_difference"] < PROBABILITY_BOUNDS[kind]


def test_other_slopes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", seq_length=SEQ_LENGTH)
    monkeypatch.setattr(write, "MAX_ALIBI_BIAS", 7.5)
    with pytest.raises(FileError, match="computes other probabilities than the source"):
        convert_to_gguf(checkpoint, tmp_path / "m.gguf", Tokenizer(str(checkpoint.config.data.tokenizer)), kind="f32")
    assert not (tmp_path / "m.gguf").exists()


def test_it_gives_the_same_ids(tmp_path: Path) -> None:
    """But for the sign U+2581 in a text, which llama.cpp takes for a space."""
    checkpoint = make_checkpoint(tmp_path / "c")
    tokenizer = Tokenizer(str(checkpoint.config.data.tokenizer))
    convert_to_gguf(checkpoint, tmp_path / "m.gguf", tokenizer, compare=False)
    for text in (*ODD_TEXTS, TEXT, (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")):
        if SPACE_SIGN not in text:
            assert tokenize_with_llama(tmp_path / "m.gguf", text) == tokenizer.encode(text), text
