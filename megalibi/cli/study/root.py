"""Where studies find the project's configurations and keep their results."""

from __future__ import annotations

from pathlib import Path

import megalibi
from megalibi.errors import ConfigError

_NEEDED = ("configs", "tests", "tools")


def find_root() -> Path:
    """Return the folder with configs/, tests/ and tools/: the repository of this package, or the current folder.

    An installed package has no repository around it.
    """
    around = Path(megalibi.__file__).parents[1]
    return around if (around / "configs").is_dir() else Path()


def get_repository(command: str) -> Path:
    """Return the repository, for a command that needs its configurations, its tests and its tools.

    Args:
        command: What the user typed, without its options.

    Raises:
        ConfigError: The package is installed without it, and the current folder is not it.
    """
    root = find_root()
    missing = [f"{name}/" for name in _NEEDED if not (root / name).is_dir()]
    if missing:
        raise ConfigError(
            f"{command}: must have the repository's {', '.join(missing)}, which an installed package lacks; get the "
            f"source of megalibi {megalibi.__version__}, and start the command in its folder"
        )
    return root
