"""What a study starts is the package that it is of, whatever stands in the current folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalibi import __version__
from megalibi.errors import ConfigError
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


def test_jobs_share_a_gpu_only_where_a_study_asks_for_it() -> None:
    """A study that measures time does not ask: beside another process on its GPU a time means nothing."""
    fields = {"environment": {}, "cores": 8, "gpus": 2}
    with pytest.raises(ConfigError, match="3 trainings at once of 1 ranks each need 3 GPUs, and there are 2"):
        Machine(**fields, jobs=3)
    with pytest.raises(ConfigError, match="3 trainings at once of 2 ranks each need 6 GPUs, and there are 2"):
        Machine(**fields, jobs=3, ranks=2, shares_gpus=True)
    shared = Machine(**fields, jobs=5, shares_gpus=True)
    assert [shared.environment_of(slot, 1)["CUDA_VISIBLE_DEVICES"] for slot in range(5)] == ["0", "1", "0", "1", "0"]
    named = Machine(**fields | {"environment": {"CUDA_VISIBLE_DEVICES": "3,6"}}, jobs=3, shares_gpus=True)
    assert [named.environment_of(slot, 1)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["3", "6", "3"]
