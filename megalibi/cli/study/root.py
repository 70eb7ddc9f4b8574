"""Where studies find the project's configurations and keep their results."""

from __future__ import annotations

from pathlib import Path

import megalibi


def find_root() -> Path:
    """Return the folder with configs/, tests/ and tools/: the repository of this package, or the current folder.

    An installed package has no repository around it.
    """
    around = Path(megalibi.__file__).parents[1]
    return around if (around / "configs").is_dir() else Path()
