"""The import law, and the rules of the house that a parser can check."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LIBRARY = sorted([*(ROOT / "megalibi").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
CLI = ROOT / "megalibi" / "cli"
COMMANDS = [path for path in LIBRARY if path.name == "__main__.py" or path.is_relative_to(CLI)]
SCRIPTS = sorted([*(ROOT / "launch").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def nodes_of(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path)))


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_import_law() -> None:
    result = run_python("from importlinter.cli import lint_imports_command; lint_imports_command()")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize("name", [module_name(path) for path in LIBRARY if path.name != "__main__.py"])
def test_every_module_can_be_imported(name: str) -> None:
    importlib.import_module(name)


def test_configuration_is_read_without_torch() -> None:
    result = run_python("import sys, megalibi.config, megalibi.log; sys.exit('torch' in sys.modules)")
    assert result.returncode == 0, result.stderr


def test_library_does_not_print() -> None:
    for path in LIBRARY:
        calls = [node for node in nodes_of(path) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        printing = [node.lineno for node in calls if node.func.id == "print"]  # type: ignore[attr-defined]
        assert not printing or path in COMMANDS, f"{path}:{printing}"


# Which names the folder of compiled kernels: PyTorch's public function for that folder does not ask it.
EXTENSIONS_DIR = 'os.environ.get("TORCH_EXTENSIONS_DIR")'


def test_environment_is_read_in_one_place() -> None:
    runtime = ROOT / "megalibi" / "runtime"
    native = ROOT / "kernels" / "alibi_attention" / "backends" / "native" / "library.py"
    assert native.read_text(encoding="utf-8").count("environ") == native.read_text().count(EXTENSIONS_DIR) == 1
    for path in LIBRARY:
        if path == native or path.parent == runtime or path.is_relative_to(CLI):  # a command is a process's own
            continue
        for node in nodes_of(path):
            names = {getattr(node, "attr", None), getattr(node, "id", None)}
            if isinstance(node, ast.ImportFrom):
                names |= {alias.name for alias in node.names}
            assert not names & {"environ", "environb", "getenv", "putenv"}, f"{path}:{node.lineno}"  # type: ignore[attr-defined]
    assert "environ" in (runtime / "ranks.py").read_text(encoding="utf-8")


def test_trap_11_kernels_is_a_source_root_and_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for path in [*LIBRARY, *SCRIPTS]:
        for node in nodes_of(path):
            imported = [getattr(node, "module", None) or ""] if isinstance(node, ast.ImportFrom) else []
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in imported if name.split(".")[0] == "kernels"], path


def test_no_path_of_imports_is_changed() -> None:
    for path in [*LIBRARY, *SCRIPTS]:
        changing = [node.lineno for node in nodes_of(path) if isinstance(node, ast.Attribute) and node.attr == "path"
                    and isinstance(node.value, ast.Name) and node.value.id == "sys"]  # fmt: skip
        assert not changing, f"{path}:{changing}"
        assert "sys.path" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("folder", ["launch", "tools", "tests"])
def test_trap_12_folders_of_scripts_and_tests_are_no_packages(folder: str) -> None:
    assert not list((ROOT / folder).rglob("__init__.py"))


def test_trap_13_constraints_pin_what_was_tested() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {r.name: str(r.specifier) for r in map(Requirement, (line for line in lines if line and line[0] != "#"))}
    assert pins["torch"] == "==2.13.0"
    assert pins["deepspeed"] == "==0.19.8"
    assert pins["numpy"].startswith("==2.2.")
