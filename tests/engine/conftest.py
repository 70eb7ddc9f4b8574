from __future__ import annotations

import pytest

from tests.support.runs import write_tokens


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens"))
