"""Every public field says what it is in whole sentences, so that a generated reference reads well."""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalibi.config import Config, DatasetConfig, model, schema

ROOT = Path(__file__).parents[1]
MIN_WORDS = 5


def field_docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each public annotated name in a public class of a file, and the docstring under it; empty: it has none."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    value = after.value if isinstance(after, ast.Expr) else None
                    text = value.value if isinstance(value, ast.Constant) else ""
                    if not statement.target.id.startswith("_"):
                        yield f"{node.name}.{statement.target.id}", str(text)


CONFIG = {name: text for module in (model, schema) for name, text in field_docstrings(Path(str(module.__file__)))}
FILES = [path for place in ("megalibi", "kernels") for path in sorted((ROOT / place).rglob("*.py"))]


def test_all_fields_are_found() -> None:
    kinds = [Config, DatasetConfig, *typing.get_type_hints(Config).values()]
    assert set(CONFIG) == {f"{kind.__name__}.{field.name}" for kind in kinds for field in dataclasses.fields(kind)}
    assert sum(len(list(field_docstrings(path))) for path in FILES) > 500


@pytest.mark.parametrize("name", CONFIG)
def test_a_fields_docstring_is_a_sentence(name: str) -> None:
    text = CONFIG[name]
    assert len(text.split()) >= MIN_WORDS, text
    assert text[0].isupper(), text
    assert text.endswith("."), text


@pytest.mark.parametrize("package", ["megalibi", "kernels"])
def test_every_public_field_is_explained(package: str) -> None:
    fields = [field for path in FILES if path.is_relative_to(ROOT / package) for field in field_docstrings(path)]
    assert fields
    bare = {name: text for name, text in fields if len(text.split()) < MIN_WORDS or not text.rstrip().endswith(".")}
    assert not bare
