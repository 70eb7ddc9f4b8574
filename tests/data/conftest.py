from __future__ import annotations

import pydoc
import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path

import pytest

from megalibi.data.tokenizer.training import train_tokenizer
from megalibi.data.tokens.token_file import TokenFileWriter

try:
    from hypothesis import settings
except ModuleNotFoundError:
    pass  # on a GPU's machine, where no test needs it
else:
    # A busy machine is no fault of the code.
    settings.register_profile("no-deadline", deadline=None)
    settings.load_profile("no-deadline")


@pytest.fixture(scope="session")
def english() -> list[str]:
    """Some hundred kilobytes of text that every Python has."""
    return [pydoc.plain(text) for _, text in sorted(pydoc_data.topics.topics.items())]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory, english: list[str]) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "english.model"
    train_tokenizer(english, 2000, path)
    return path


@pytest.fixture
def write_tokens(tmp_path: Path):
    """Write documents to a token file and return its prefix."""

    def write(documents: Sequence[Sequence[int]], name: str = "set", vocab_size: int = 100_000) -> str:
        prefix = str(tmp_path / name)
        with TokenFileWriter(prefix, vocab_size) as writer:
            for document in documents:
                writer.add_document(document)
        return prefix

    return write
