"""A study's configuration: a run's YAML with a section ``study`` more, which says what the runs of the study vary."""

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
        overrides: ``section.field=value`` strings; ``study.field=value`` too.
        schema: The dataclass of the section ``study``.

    Returns:
        The section ``study``, and the run that the study varies.

    Raises:
        ConfigError: The file is missing or has no section ``study``, a key is unknown, or a value is not allowed.
    """
    tree = load_tree(path, overrides)
    if SECTION not in tree:
        raise ConfigError(f"{path} has no section {SECTION}: a run's sections and {SECTION} are expected")
    return build_section(schema, tree.pop(SECTION), SECTION), config_from_dict(tree)
