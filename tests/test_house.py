"""The rules of docs/house.md that can be counted, and that the documents name what is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ["megalibi", "kernels/alibi_attention", "kernels/fused_ops"]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
DOCUMENTS += ["kernels/alibi_attention/README.md", "kernels/fused_ops/README.md"]
MAX_FILE_LINES = 300
MAX_LEVEL_LINES = 1_500
MAX_LEVEL_FILES = 12
ONE_NAME_MANY_PLACES = {
    "main": "",  # of each script
    "parse_arguments": "tools/",  # of each script
    "console": "tools/",  # of each script
    "run": "megalibi/cli/",  # each command has it
    "add_arguments": "megalibi/cli/",  # each command has it
    "attend": "kernels/alibi_attention/backends/",  # each back end has it
    "capability": "kernels/alibi_attention/backends/",  # each back end has it
    "round_to": "kernels/",  # the two packages of kernels may not import each other
}
"""Names that several modules have on purpose, and below which folder."""
PLACES = ("megalibi/", "kernels/", "launch/", "tools/", "configs/", "tests/", "results/", "docs/")
# Of a user, in an example; written by a command.
NOT_THERE = re.compile(r"NAME|\*|results/gpu_NAME|\.\.\.|runs/|data/")


def levels() -> Iterator[tuple[str, list[Path]]]:
    for package in PACKAGES:
        folders = [ROOT / package, *(path for path in (ROOT / package).rglob("*") if path.is_dir())]
        for folder in folders:
            if files := sorted(folder.glob("*.py")):
                yield str(folder.relative_to(ROOT)), files


def count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_level_has_more_than_one_can_look_over() -> None:
    found = dict(levels())
    assert len(found) > 20
    for level, files in found.items():
        modules = [path for path in files if path.name != "__init__.py"]
        assert len(modules) <= MAX_LEVEL_FILES, level
        assert sum(map(count_lines, files)) <= MAX_LEVEL_LINES, level


@pytest.mark.parametrize("place", [*PACKAGES, "launch", "tools"])
def test_no_file_is_longer_than_one_can_look_over(place: str) -> None:
    files = [*(ROOT / place).rglob("*.py")]
    assert files
    too_long = {str(path.relative_to(ROOT)): lines for path in files if (lines := count_lines(path)) > MAX_FILE_LINES}
    assert not too_long


def test_every_room_says_what_it_is_for() -> None:
    for level, files in levels():
        init = next((path for path in files if path.name == "__init__.py"), None)
        assert init is not None, f"{level} has modules and no __init__.py"
        said = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8")))
        assert said, level
        assert len(said.split()) >= 5, f"{level}: {said}"


def public_names(path: Path) -> Iterator[str]:
    """The public classes, functions and type aliases of a module."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = []
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            names = [name for name in names if name != name.upper()]  # an alias, no constant
        yield from (name for name in names if not name.startswith("_"))


def test_a_public_name_has_one_meaning() -> None:
    places: dict[str, list[str]] = {}
    for place in [*PACKAGES, "tools"]:
        for path in (ROOT / place).rglob("*.py"):
            where = str(path.relative_to(ROOT))
            for name in public_names(path):
                if not where.startswith(ONE_NAME_MANY_PLACES.get(name, "nowhere")):
                    places.setdefault(name, []).append(where)
    assert len(places) > 500
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


@pytest.mark.parametrize("document", ["README.md", "docs/house.md"])
def test_the_maps_have_every_room(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for room in (path for path in (ROOT / "megalibi").iterdir() if (path / "__init__.py").exists()):
        assert f"{room.name}/" in text, f"{document} does not name {room.name}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_what_is_there(document: str) -> None:
    """Links, paths in backticks that begin with a folder of the repository, and names of test files anywhere."""
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)]
    missing = [link for link in links if link and not (path.parent / link).exists()]
    quoted = re.findall(r"`([^`\s]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    named = [name for name in quoted if name.startswith(PLACES) and not NOT_THERE.search(name)]
    missing += [name for name in named if not (ROOT / name).exists() and not (path.parent / name).exists()]
    tests = {test.name for test in (ROOT / "tests").rglob("test_*.py")}
    missing += [name for name in re.findall(r"\btest_\w+\.py\b", text) if name not in tests and "NAME" not in name]
    assert not missing
