"""Reads a YAML file and ``section.field=value`` overrides into a Config, and writes a run's config.yaml."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megalibi.config.checks import MAX_WHOLE_NUMBER, refuse, shorten
from megalibi.config.schema import Config, DatasetConfig
from megalibi.config.yaml_text import SavedLoader, SpellingLoader, ValueLoader, parse_yaml, read_yaml
from megalibi.errors import ConfigError
from megalibi.files import write_aside

_KEY = re.compile(r"\w+(\.\w+|\[\w+\])*")
_Section = TypeVar("_Section")


class Scalar(str):
    """A value of a file or an override as it was typed, and what YAML makes of it."""

    value: bool | int | float | str | None
    """What YAML makes of the text."""

    def __new__(cls, spelling: str, value: bool | int | float | str | None) -> Scalar:
        """Make a text that remembers a value."""
        scalar = super().__new__(cls, spelling)
        scalar.value = value
        return scalar


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run's configuration.

    Args:
        path: A YAML file with the sections of Config.
        overrides: ``section.field=value`` strings; values are read as YAML and win over the file.

    Raises:
        ConfigError: The file is not YAML, a key is unknown, or a value cannot be used.
        FileError: The file cannot be read.
    """
    return config_from_dict(load_tree(path, overrides))


def load_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file of sections and merge overrides into it; its keys and values are not checked.

    Returns:
        Nested mappings and lists of Scalars.

    Raises:
        ConfigError: The file is not YAML, an override has no value, or a value is still missing (``???``).
        FileError: The file cannot be read.
    """
    text = read_yaml(path)
    values, spellings = (_merge(text, overrides, loader, str(path)) for loader in (ValueLoader, SpellingLoader))
    return typing.cast(dict[str, Any], _pair(values, spellings, ""))


def config_from_dict(tree: dict[str, Any]) -> Config:
    """Build a Config from nested plain values, as they stand in YAML.

    Raises:
        ConfigError: A key is unknown or missing, or a value cannot be used.
    """
    return build_section(Config, tree, "")


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration; ``load_config`` reads it back to an equal Config."""
    tree = _escape_interpolations(config_to_dict(config))
    write_aside(path, yaml.safe_dump(tree, sort_keys=False))


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return nested plain values that ``config_from_dict`` accepts."""
    tree = dataclasses.asdict(config)
    for split in ("train", "valid"):
        tree["data"][split] = list(tree["data"][split])
    tree["data"]["skip"] = list(tree["data"]["skip"])
    tree["model"]["adaptive_cutoffs"] = list(tree["model"]["adaptive_cutoffs"])
    return tree


def _escape_interpolations(tree: Any) -> Any:
    """Return nested plain values in which no text means another value."""
    if isinstance(tree, dict):
        return {key: _escape_interpolations(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_escape_interpolations(value) for value in tree]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", tree) if isinstance(tree, str) else tree


def _merge(text: str, overrides: Sequence[str], loader: type[SavedLoader], source: str) -> Any:
    """Return the values of a file under overrides, by one reading of scalars; interpolations are resolved."""
    tree = parse_yaml(text, loader, f"{source} is not a valid configuration")
    if not isinstance(tree, dict):
        what = "is empty" if tree is None else "is not a configuration"
        raise ConfigError(f"{source} {what}: it must be a mapping of {', '.join(_names(Config))}")
    parsed = [_parse_override(override, loader) for override in overrides]
    try:
        changes = OmegaConf.create({})
        for key, value in parsed:
            OmegaConf.update(changes, key, value)
        return OmegaConf.to_container(OmegaConf.merge(tree, changes), resolve=True)
    except (OmegaConfBaseException, ValueError) as error:  # ValueError: a list's entry by a name
        raise ConfigError(f"{source} is not a valid configuration: {' '.join(str(error).split())}") from error
    except RecursionError as error:  # of aliases and interpolations within each other
        raise ConfigError(f"{source} is not a valid configuration: it is nested too deeply") from error


def _parse_override(override: str, loader: type[SavedLoader]) -> tuple[str, Any]:
    key, _, text = override.partition("=")
    if "=" not in override or not _KEY.fullmatch(key):
        raise ConfigError(f"override {shorten(repr(override))}: must be section.field=value")
    value = parse_yaml(text, loader, f"override {shorten(repr(override))} cannot be read")
    quoted = text.lstrip().startswith(("'", '"'))
    if loader is SpellingLoader and isinstance(value, str) and not quoted and text.lstrip().startswith(value):
        value = text.strip()  # a name may hold " #", where YAML begins a comment
    if _holds_missing(value):  # OmegaConf would leave the file's value
        refuse(key, MISSING, "be a value")
    return key, value


def _holds_missing(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return any(map(_holds_missing, value.values() if isinstance(value, dict) else value))
    return bool(value == MISSING)


def _pair(values: Any, spellings: Any, path: str) -> Any:
    """Join the two readings of a file: mappings and lists as they are, scalars with both."""
    if isinstance(values, dict):
        return {key: _pair(value, spellings[key], _join(path, key)) for key, value in values.items()}
    if isinstance(values, list):
        pairs = enumerate(zip(values, spellings, strict=True))
        return [_pair(value, spelling, f"{path}[{i}]") for i, (value, spelling) in pairs]
    if values == MISSING:
        raise ConfigError(f"{path} is missing, its value is {MISSING}: give it in the file or as {path}=VALUE")
    return Scalar(spellings, values) if isinstance(spellings, str) else values


def _names(section: type) -> list[str]:
    return [f.name for f in dataclasses.fields(section)]


def build_section(section: type[_Section], tree: Any, path: str) -> _Section:
    """Build a section's dataclass from nested plain values.

    Args:
        section: The dataclass.
        tree: Its fields by name.
        path: The section's own name, which an error puts before the field's.

    Raises:
        ConfigError: A key is unknown or missing, or a value cannot be used.
    """
    where = path or "the configuration"
    if not isinstance(tree, dict):
        refuse(where, _show(tree), f"be a mapping with {', '.join(_names(section))}")
    hints = typing.get_type_hints(section)
    for key in tree:
        if key not in hints:
            nearest = difflib.get_close_matches(str(key), list(hints), n=1, cutoff=0.0)[0]
            raise ConfigError(f"{_join(path, shorten(str(key)))} is unknown: did you mean {_join(path, nearest)}?")
    values = {key: _convert(hints[key], value, _join(path, key)) for key, value in tree.items()}
    for f in dataclasses.fields(section):  # type: ignore[arg-type]
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in values:
            raise ConfigError(
                f"{_join(path, f.name)} is missing: give it in the file or as {_join(path, f.name)}=VALUE"
            )
    return section(**values)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build_section(typing.cast(type, hint), value, path)
    if hint == tuple[DatasetConfig, ...]:
        return _convert_datasets(value, path)
    if typing.get_origin(hint) is tuple:  # tuple[int, ...] and its like
        if not isinstance(value, (list, tuple)):
            refuse(path, _show(value), "be a list")
        return tuple(_convert(typing.get_args(hint)[0], entry, f"{path}[{i}]") for i, entry in enumerate(value))
    if isinstance(hint, types.UnionType):  # str | None or float | None
        return None if _plain(value) is None else _convert(typing.get_args(hint)[0], value, path)
    return _convert_text(value, path) if hint is str else _convert_plain(hint, value, path)


def _convert_text(value: Any, path: str) -> str:
    """Return a text as it was typed; a number without a spelling, such as another program's, as Python writes it."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (isinstance(value, str) or number) or (isinstance(value, Scalar) and value.value is None and not value):
        refuse(path, _show(value), "be text")
    if "\0" in str(value):  # no file can be called so
        refuse(path, _show(value), "be text without NUL characters")
    return str(value)


def _convert_plain(hint: type, value: Any, path: str) -> Any:
    plain = _plain(value)
    if hint is float and type(plain) is int and abs(plain) <= sys.float_info.max:
        plain = float(plain)
    if hint is int and (plain in (math.inf, -math.inf) or (type(plain) is int and abs(plain) > MAX_WHOLE_NUMBER)):
        refuse(path, _show(value), "be a whole number of at most 64 bits")
    if type(plain) is not hint:
        kind = {int: "a whole number", float: "a number", bool: "true or false"}[hint]
        refuse(path, _show(value), f"be {kind}")
    if isinstance(plain, float) and not math.isfinite(plain):
        refuse(path, _show(value), "be a finite number")
    return plain


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Scalar) else value


def _show(value: Any) -> str:
    """Return a value as an error names it: as typed if it is an unusual number, and never longer than a line."""
    plain = _plain(value)
    unusual = isinstance(value, Scalar) and isinstance(plain, (int, float)) and not abs(plain) <= MAX_WHOLE_NUMBER
    return shorten(str(value) if unusual else "null" if plain is None else repr(plain))


def _convert_datasets(value: Any, path: str) -> tuple[DatasetConfig, ...]:
    if _plain(value) is None:
        return ()
    if isinstance(value, str):
        return (DatasetConfig(prefix=str(value)),)
    if not isinstance(value, list):
        refuse(path, _show(value), "be a PREFIX or a list of {prefix, weight}")
    return tuple(
        DatasetConfig(prefix=_convert_text(entry, f"{path}[{i}]"))
        if isinstance(entry, str)
        else build_section(DatasetConfig, entry, f"{path}[{i}]")
        for i, entry in enumerate(value)
    )
