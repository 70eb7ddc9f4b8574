"""Which fields decide what a run is, and which may change when it resumes: collected from the fields' annotations.

docs/resume.md has the same as a table for users; a test holds the two together.
"""

from __future__ import annotations

import typing
from typing import Any

from megalibi.config.annotations import Decides, Files, OnResume
from megalibi.config.load import config_to_dict
from megalibi.config.schema import Config


def _collect_annotations() -> dict[str, tuple[Any, ...]]:
    """Return what each field's type is annotated with, by section.field."""
    return {
        f"{section}.{name}": hint.__metadata__
        for section, kind in typing.get_type_hints(Config).items()
        for name, hint in typing.get_type_hints(kind, include_extras=True).items()
    }


_ANNOTATIONS = _collect_annotations()

ON_RESUME: dict[str, OnResume] = {
    name: next(mark for mark in marks if isinstance(mark, OnResume)) for name, marks in _ANNOTATIONS.items()
}
"""What happens when a run resumes with another value of a field, by section.field."""

DECIDES: dict[str, Decides] = {
    name: next((mark for mark in marks if isinstance(mark, Decides)), Decides.WEIGHTS)
    for name, marks in _ANNOTATIONS.items()
}
"""What a field decides, by section.field."""

BY_CONTENT = frozenset(name for name, marks in _ANNOTATIONS.items() if Files.BY_CONTENT in marks)
"""Fields that name files: what the files hold is compared, and where they stand is free."""

NO_WEIGHT_DEPENDS_ON = frozenset(name for name, decides in DECIDES.items() if decides is Decides.NO_WEIGHT)
"""Fields that leave every weight as it is."""


def find_changes(theirs: Config, ours: Config) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ, by section.field, with both values; fields that name files are left out."""
    return {name: values for name, values in find_differences(theirs, ours).items() if name not in BY_CONTENT}


def flatten_config(config: Config) -> dict[str, Any]:
    """Return every value of a configuration by section.field."""
    tree = config_to_dict(config)
    return {f"{section}.{name}": value for section, fields in tree.items() for name, value in fields.items()}


def find_differences(theirs: Config, ours: Config) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ, by section.field, with both values; files are compared by their names."""
    theirs_flat = flatten_config(theirs)
    return {
        name: (theirs_flat[name], value) for name, value in flatten_config(ours).items() if value != theirs_flat[name]
    }
