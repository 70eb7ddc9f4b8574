"""Build a small corpus from what every Python installation ships, for a first training run without a download.

Three kinds of documents: pydoc's topics, the docstrings of the standard library, and its sources. A module is in the
training set or in the validation set as a whole, by a hash of its name. The same Python gives the same files.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import importlib.util
import json
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

from megalibi.errors import ConfigError, FileError
from megalibi.files import make_folder, open_aside
from megalibi.runtime.exit import run_tool

EXAMPLE = """example:
  python tools/build_sample_corpus.py --output data/sample      # writes train.jsonl and valid.jsonl
"""
# Nobody reads tests for their text, encodings are tables, and installed packages are not the standard library.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
VALIDATION_PERCENT = 3
MIN_BYTES = 10_000_000


def iterate_documents() -> Iterator[tuple[str, str]]:
    """Yield pairs of a module's (or topic's) name and a document that belongs to it, in a fixed order."""
    for name, text in sorted(topics.items()):
        yield f"topic {name}", text
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS.intersection(relative.parts) or relative.parts[0] == "pydoc_data":
            continue
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        try:
            with tokenize.open(path) as file:  # sources say their own encoding
                source = file.read()
            docstrings = collect_docstrings(name, source)
        except (SyntaxError, UnicodeDecodeError):
            continue  # examples of errors, and templates
        yield name, docstrings
        yield name, source
    for name in sorted(sys.stdlib_module_names):
        yield name, collect_compiled_docstrings(name)


def collect_docstrings(name: str, source: str) -> str:
    """Write the docstrings of a module's source as one text, each under the name of what it describes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old sources have invalid escapes
        tree = ast.parse(source)
    sections: list[str] = []

    def visit(node: ast.AST, path: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                sections.append(f"{path}\n\n{docstring}\n")
            for child in node.body:
                visit(child, f"{path}.{getattr(child, 'name', '')}")

    visit(tree, name)
    return "\n".join(sections)


def collect_compiled_docstrings(name: str) -> str:
    """Write the docstrings of a module that has no Python source; empty if it has one, or is not there."""
    spec = importlib.util.find_spec(name) if name not in ("__main__", "antigravity", "this") else None
    if spec is None or (spec.origin or "").endswith(".py"):
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated modules
            module = importlib.import_module(name)
    except ImportError:
        return ""
    sections = [f"{name}\n\n{module.__doc__}\n"] if module.__doc__ else []
    for attribute, value in sorted(vars(module).items()):
        sections.extend(find_docstrings(f"{name}.{attribute}", value))
    return "\n".join(sections)


def find_docstrings(path: str, value: object) -> Iterator[str]:
    """Yield the docstrings of a function, or of a class and its methods."""
    docstring = getattr(value, "__doc__", None)
    if isinstance(value, ModuleType) or not callable(value) or not isinstance(docstring, str):
        return
    yield f"{path}\n\n{docstring}\n"
    if isinstance(value, type):
        for attribute, member in sorted(vars(value).items()):
            inherited = getattr(getattr(object, attribute, None), "__doc__", None)
            text = getattr(member, "__doc__", None)
            if callable(member) and isinstance(text, str) and text != inherited:
                yield f"{path}.{attribute}\n\n{text}\n"


def is_validation(name: str) -> bool:
    """Tell whether a module belongs to the validation set: a hash of its name decides."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100 < VALIDATION_PERCENT


def build(output: Path) -> tuple[int, int]:
    """Write train.jsonl and valid.jsonl, aside and then renamed.

    Returns:
        The bytes of text in the training set and in the validation set.

    Raises:
        ConfigError: This Python ships too little text.
        FileError: The folder cannot be written.
    """
    num_bytes = [0, 0]
    try:
        make_folder(output)
        with open_aside(output / "train.jsonl") as train, open_aside(output / "valid.jsonl") as valid:
            for name, text in iterate_documents():
                if text.strip():
                    chosen = int(is_validation(name))
                    (train, valid)[chosen].write(json.dumps({"text": text}).encode() + b"\n")
                    num_bytes[chosen] += len(text.encode())
            if sum(num_bytes) < MIN_BYTES:
                raise ConfigError(
                    f"{sys.executable}: its standard library has {sum(num_bytes)} bytes of text, {MIN_BYTES} are "
                    "needed; use a complete Python installation"
                )
    except OSError as error:
        raise FileError(f"{output}: cannot be written: {error.strerror}") from error
    return num_bytes[0], num_bytes[1]


def main() -> None:
    """Build the corpus, and print its sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for train.jsonl, valid.jsonl")
    arguments = parser.parse_args()
    train_bytes, valid_bytes = build(arguments.output)
    print(f"{arguments.output}: train.jsonl {train_bytes / 1e6:.1f} MB, valid.jsonl {valid_bytes / 1e6:.1f} MB of text")


if __name__ == "__main__":
    run_tool(main)
