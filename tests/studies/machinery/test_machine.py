"""What a study starts is the package that it is of, whatever stands in the current folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalibi import __version__
from megalibi.studies.machinery.machine import COMMAND_SCRIPT, Machine
from tests.support.jobs import LAUNCHER_VARIABLES

ROOT = Path(__file__).parents[3]
EDITABLE = f"""
import sys
from importlib.machinery import PathFinder

class Editable:
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, {[str(ROOT), str(ROOT / "kernels")]}) if path is None else None

sys.meta_path.insert(sys.meta_path.index(PathFinder) + 1, Editable)
"""
"""As pip's editable installs do: the package is found where no folder of sys.path has something of its name."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a user with an editable install."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(EDITABLE)
    ours = {"PYTHONPATH": str(tmp_path / "site"), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES} | ours


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_folder_called_megalibi_hides_no_command(tmp_path: Path, environment: dict[str, str], ranks: int) -> None:
    beside = tmp_path / "beside"
    (beside / "megalibi").mkdir(parents=True)

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=beside, env=environment, capture_output=True, text=True)

    hidden = run([sys.executable, "-m", "megalibi", "--version"])
    assert (hidden.returncode, hidden.stdout) == (1, "")  # how it fails depends on the kind of install
    done = run(Machine(environment=environment, cores=2, ranks=ranks).launch(0, "--version"))
    assert done.returncode == 0, done.stderr
    # Counted in the text: ranks whose output is not buffered write their words and the end of the line one by one.
    assert done.stdout.count(f"megalibi {__version__}") == done.stdout.count("\n") == ranks


def test_the_script_has_a_folder_of_its_own() -> None:
    """Python puts it first among the places of modules: a module beside it would be taken for another's."""
    folder = Path(COMMAND_SCRIPT).parent
    assert sorted(path.name for path in folder.glob("*.py")) == ["__init__.py", "megalibi_command.py"]
