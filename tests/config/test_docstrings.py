"""Every field of the configuration says what it is in whole sentences, so that a generated reference reads well."""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalibi.config import Config, DatasetConfig, model, schema

MIN_WORDS = 5


def field_docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each annotated name in a class of a file, and the docstring under it; empty: it has none."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    value = after.value if isinstance(after, ast.Expr) else None
                    text = value.value if isinstance(value, ast.Constant) else ""
                    yield f"{node.name}.{statement.target.id}", str(text)


FIELDS = {name: text for module in (model, schema) for name, text in field_docstrings(Path(str(module.__file__)))}


def test_all_fields_are_found() -> None:
    kinds = [Config, DatasetConfig, *typing.get_type_hints(Config).values()]
    assert set(FIELDS) == {f"{kind.__name__}.{field.name}" for kind in kinds for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("name", FIELDS)
def test_a_fields_docstring_is_a_sentence(name: str) -> None:
    text = FIELDS[name]
    assert len(text.split()) >= MIN_WORDS, text
    assert text[0].isupper(), text
    assert text.endswith("."), text
