from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch

from megalibi.export.comparison import choose_text

ROOT = Path(__file__).parents[2]


def test_the_text_is_the_licence_that_the_project_has() -> None:
    shipped = resources.files("megalibi.export").joinpath("license.txt").read_text(encoding="utf-8")
    assert shipped == (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_without_a_tokenizer_the_tokens_are_random_and_always_the_same() -> None:
    text, again = choose_text(64, 100, None), choose_text(64, 100, None)
    assert torch.equal(text.tokens, again.tokens)
    assert "random ids of seed" in text.description
    assert len(text.tokens.unique()) > 32
