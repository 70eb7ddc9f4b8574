from __future__ import annotations

from pathlib import Path

import pytest

from megalibi.data.tokens.random_tokens import write_random_tokens
from megalibi.data.tokens.token_file import TokenFile


def test_random_tokens_are_written_once(tmp_path: Path) -> None:
    prefix = tmp_path / "new" / "tokens"
    write_random_tokens(prefix, 509, 5000)
    found = TokenFile(prefix)
    tokens = found.read(0, 5000)
    assert found.num_tokens == 5000
    assert found.num_documents == 6
    assert 0 <= tokens.min() <= tokens.max() < 509
    assert tokens.max() == pytest.approx(508, abs=2)
    write_random_tokens(prefix, 509, 9000)
    assert TokenFile(prefix).num_tokens == 5000
