"""A study's configuration: the YAML of a run, with one more section, ``study``, which says what the runs vary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from megalibi.config import Config, config_from_dict
from megalibi.config.load import build_section, load_tree
from megalibi.errors import ConfigError

SECTION = "study"

_Study = TypeVar("_Study")


def load_study(path: str | Path, overrides: Sequence[str], schema: type[_Study]) -> tuple[_Study, Config]:
    """Read a study's configuration.

    Args:
        path: A YAML file with the sections of Config and ``study``.
        overrides: ``section.field=value`` strings, of the section ``study`` too.
        schema: The dataclass of the section ``study``.

    Returns:
        The section ``study``, and the run that the study varies.

    Raises:
        ConfigError: The file is missing or has no section ``study``, a key is unknown, or a value cannot be used.
    """
    tree = load_tree(path, overrides)
    if SECTION not in tree:
        raise ConfigError(f"{path}: must have the section {SECTION} beside the sections of a run")
    return build_section(schema, tree.pop(SECTION), SECTION), config_from_dict(tree)
