"""Reads YAML whose only content is values: no tags, no endless aliases, no deep nesting.

A scalar has two readings, what YAML makes of it and how it was typed: ``1e5`` is a number where a number is wanted, and
three letters where a folder's name is. Each reading has its loader; load.py lets the type of the field choose.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from megalibi.errors import ConfigError, FileError

MAX_DEPTH = 32
"""The most levels of lists and mappings within each other; a configuration has four."""
MAX_VALUES = 10_000
"""The most values of a file, those that aliases repeat included."""
_MAX_BITS = 1024
"""The most bits of a whole number: one of more is above all floating point numbers, and may be too long to print."""

_TAG = "tag:yaml.org,2002:"
_TEXT_TAG = f"{_TAG}str"
_MERGE_TAG = f"{_TAG}merge"
_SCALAR_TAGS = (_TEXT_TAG, _MERGE_TAG, *(f"{_TAG}{kind}" for kind in ("int", "float", "bool", "null")))

# As in YAML 1.2 and OmegaConf an exponent needs no point before it, nor a sign: 1e-3 is a number.
_FLOAT = re.compile(
    r"[-+]?[0-9]+(_[0-9]+)*\.[0-9_]*([eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9]+(_[0-9]+)*[eE][-+]?[0-9]+$"
    r"|[-+]?\.[0-9]+(_[0-9]+)*([eE][-+]?[0-9]+)?$"
)


class SavedLoader(yaml.SafeLoader):
    """Reads what yaml.safe_dump wrote, and of what others write only mappings, lists and scalars."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Refuse what is nested too deeply."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"values must be nested at most {MAX_DEPTH} levels deep",
                problem_mark=self.peek_event().start_mark,
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that is not text, or stands twice."""
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag not in (_TEXT_TAG, _MERGE_TAG) or not isinstance(key, yaml.ScalarNode):
                what = f"the key {key.value!r}" if isinstance(key, yaml.ScalarNode) else f"the key, a {key.id},"
                raise yaml.MarkedYAMLError(problem=f"{what} must be a name", problem_mark=key.start_mark)
            if key.value in seen:
                problem = f"{key.value} stands twice, first in line {seen[key.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen[key.value] = line
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        """Refuse what aliases make endless, or nearly."""
        if _count_values(node, {}) > MAX_VALUES:
            problem = f"the file must have at most {MAX_VALUES:,} values, those that aliases repeat included"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_document(node)

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        """Return what YAML makes of a scalar; a number beyond all floating point numbers is infinite."""
        construct = yaml.SafeLoader.yaml_constructors[_TEXT_TAG if node.tag == _MERGE_TAG else node.tag]
        try:
            value = construct(self, node)
        except (ValueError, LookupError):  # more digits than Python reads as a whole number; or !!int x
            value = _float_or_none(node.value)
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            return math.inf if value > 0 else -math.inf
        if value is None and node.tag != f"{_TAG}null":
            problem = f"{node.value!r} must be of the type {node.tag.removeprefix(_TAG)}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return value

    def refuse_tag(self, node: yaml.Node) -> Any:
        """Refuse sets, Python's objects and whatever else a tag may ask for."""
        raise yaml.MarkedYAMLError(
            problem=f"the tag {node.tag.replace(_TAG, '!!')} must be left out", problem_mark=node.start_mark
        )


class ValueLoader(SavedLoader):
    """Reads scalars as what they are: numbers, booleans, null, texts."""


class SpellingLoader(ValueLoader):
    """Reads every scalar as the text that was typed."""


SavedLoader.yaml_constructors = {
    f"{_TAG}seq": yaml.SafeLoader.construct_yaml_seq,
    f"{_TAG}map": yaml.SafeLoader.construct_yaml_map,
    **dict.fromkeys(_SCALAR_TAGS, SavedLoader.construct_number),
    None: SavedLoader.refuse_tag,
}
# Dates are texts, and so is a lone "=".
SavedLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{_TAG}timestamp", f"{_TAG}value")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
ValueLoader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))
SpellingLoader.yaml_constructors = {
    **SavedLoader.yaml_constructors,
    **dict.fromkeys(_SCALAR_TAGS, SpellingLoader.construct_scalar),
}


def read_yaml(path: str | Path) -> str:
    """Return the text of a YAML file.

    Raises:
        ConfigError: The file is not UTF-8.
        FileError: The file cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a valid configuration: {error}") from error


def parse_yaml(text: str, loader: type[SavedLoader], complaint: str) -> Any:
    """Return the values of a text.

    Args:
        text: The YAML.
        loader: The loader, which says how scalars are read.
        complaint: The beginning of an error, such as "run.yaml is not a valid configuration".

    Raises:
        ConfigError: The text cannot be read; the message is one line and names the line in the text.
    """
    try:
        return yaml.load(text, loader)
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark, ", ".join(part for part in (error.context, error.problem) if part)
        where = f" line {mark.line + 1}:" if mark is not None and "\n" in text else ""
        raise ConfigError(f"{complaint}:{where} {' '.join(problem.split())}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{complaint}: {' '.join(str(error).split())}") from error


def _count_values(node: yaml.Node, counts: dict[yaml.Node, float]) -> float:
    """Return how many values a node stands for; without end if it is within itself."""
    if node not in counts:
        counts[node] = math.inf
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        pairs = (child if isinstance(child, tuple) else (child,) for child in children)
        counts[node] = 1 + sum(_count_values(child, counts) for pair in pairs for child in pair)
    return counts[node]


def _float_or_none(text: str) -> float | None:
    try:
        return float(text.replace("_", ""))
    except ValueError:
        return None
