"""The import law, and the rules of the house that a parser can check."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.api import read_configuration
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
    modules = "megalibi.config, megalibi.console, megalibi.errors, megalibi.files, megalibi.log, megalibi.units"
    result = run_python(f"import sys, {modules}; sys.exit('torch' in sys.modules)")
    assert result.returncode == 0, result.stderr


def test_library_does_not_print() -> None:
    for path in LIBRARY:
        calls = [node for node in nodes_of(path) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        printing = [node.lineno for node in calls if node.func.id == "print"]  # type: ignore[attr-defined]
        assert not printing or path in COMMANDS, f"{path}:{printing}"


# Which names the folder of compiled kernels: PyTorch's public function for that folder does not ask it.
EXTENSIONS_DIR = 'os.environ.get("TORCH_EXTENSIONS_DIR")'
NATIVE_LIBRARY = "kernels/alibi_attention/backends/native/library.py"
ENVIRONMENT_READERS = {
    "megalibi/runtime/environment.py",  # what torch and CUDA read as they begin
    "megalibi/runtime/device.py",  # DS_ACCELERATOR, CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS
    "megalibi/runtime/exit.py",  # hands it to find_place
    "megalibi/runtime/ranks.py",  # what a launcher says of a rank, and what DeepSpeed reads of it
    "megalibi/runtime/spokesman.py",  # which rank speaks if that cannot be read, and whether torchrun keeps the port
    # A command sets what a library reads as it is imported, or hands the environment on to processes that it starts.
    "megalibi/cli/checkpoint.py",
    "megalibi/cli/convert/actions.py",
    "megalibi/cli/inference/lm_evaluate.py",
    "megalibi/cli/plan.py",
    "megalibi/cli/study/compare_1p3b.py",
    "megalibi/cli/study/extrapolate.py",
    "megalibi/cli/study/measure_device.py",
    "megalibi/cli/study/measure_gpu.py",
    "megalibi/cli/warm_triton.py",
    NATIVE_LIBRARY,
}


def test_environment_is_read_in_these_modules_only() -> None:
    readers = set()
    for path in LIBRARY:
        for node in nodes_of(path):
            names = {getattr(node, "attr", None), getattr(node, "id", None)}
            if isinstance(node, ast.ImportFrom):
                names |= {alias.name for alias in node.names}
            if names & {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}:
                readers.add(str(path.relative_to(ROOT)))
    assert readers == ENVIRONMENT_READERS
    native = (ROOT / NATIVE_LIBRARY).read_text(encoding="utf-8")
    assert native.count("environ") == native.count(EXTENSIONS_DIR) == 1


CONTRACTS = {
    contract["name"]: contract for contract in read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]
}
ROOMS = {path.stem for path in (ROOT / "megalibi").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
ROOMS -= {"__init__"}


def sources_of(contract: str) -> set[str]:
    """Return the packages and modules of megalibi that a contract binds."""
    names = CONTRACTS[contract]["source_modules"]
    return {name.removeprefix("megalibi.") for name in names if name.startswith("megalibi.")}


@pytest.mark.parametrize(
    ("contract", "may"),
    [
        ("Only megalibi.model knows alibi_attention", {"model"}),
        ("Only megalibi.model and megalibi.parallel know fused_ops", {"model", "parallel"}),
        ("Only megalibi.engine and megalibi.checkpoint know DeepSpeed", {"engine", "checkpoint"}),
    ],
)
def test_a_contract_binds_every_package_but_those_that_it_names(contract: str, may: set[str]) -> None:
    bound = sources_of(contract)
    assert not bound & may
    assert bound | may == ROOMS


def test_all_that_stands_at_or_below_the_configuration_imports_no_torch() -> None:
    layers = CONTRACTS["Imports go down the life of a training step, and siblings do not know each other"]["layers"]
    below = {name.strip() for layer in layers[layers.index("config") :] for name in layer.split("|")}
    assert sources_of("A configuration and what stands below it import no torch") == below


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
