"""From a YAML file and ``section.field=value`` overrides to a Config, and back to the run's config.yaml."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megalibi.config.errors import ConfigError
from megalibi.config.schema import Config, DatasetConfig
from megalibi.files import write_aside

_Section = TypeVar("_Section")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run's configuration.

    Args:
        path: A YAML file with the sections of Config.
        overrides: ``section.field=value`` strings; values are read as YAML and win over the file.

    Raises:
        ConfigError: The file is missing or no YAML, a key is unknown, or a value is not allowed.
    """
    return config_from_dict(load_tree(path, overrides))


def load_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file of sections and merge overrides into it; its keys and values are not checked.

    Raises:
        ConfigError: The file is missing or no YAML, or an override is none.
    """
    path = Path(path)
    try:
        tree = OmegaConf.create(path.read_text(encoding="utf-8"))
        if not OmegaConf.is_dict(tree):
            raise ConfigError(f"{path} is not a configuration: a mapping of {', '.join(_names(Config))} is expected")
        merged = OmegaConf.merge(tree, OmegaConf.from_dotlist(_check_overrides(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a valid configuration: {' '.join(str(error).split())}") from error
    return typing.cast(dict[str, Any], values)


def config_from_dict(tree: dict[str, Any]) -> Config:
    """Build a Config from nested plain values, as they stand in YAML.

    Raises:
        ConfigError: A key is unknown or missing, or a value is not allowed.
    """
    return build_section(Config, tree, "")


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration; ``load_config`` reads it back to an equal Config."""
    write_aside(path, yaml.safe_dump(config_to_dict(config), sort_keys=False))


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return nested plain values that ``config_from_dict`` accepts."""
    tree = dataclasses.asdict(config)
    for split in ("train", "valid"):
        tree["data"][split] = list(tree["data"][split])
    tree["model"]["adaptive_cutoffs"] = list(tree["model"]["adaptive_cutoffs"])
    return tree


def _check_overrides(overrides: Sequence[str]) -> list[str]:
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not allowed: section.field=value is")
    return list(overrides)


def _names(section: type) -> list[str]:
    return [f.name for f in dataclasses.fields(section)]


def build_section(section: type[_Section], tree: Any, path: str) -> _Section:
    """Build a section's dataclass from nested plain values.

    Args:
        section: The dataclass.
        tree: Its fields by name.
        path: What an error puts before a field's name: the section's own.

    Raises:
        ConfigError: A key is unknown or missing, or a value is not allowed.
    """
    where = path or "the configuration"
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}={tree!r} is not allowed: a mapping with {', '.join(_names(section))} is")
    hints = typing.get_type_hints(section)
    for key in tree:
        if key not in hints:
            nearest = difflib.get_close_matches(str(key), list(hints), n=1, cutoff=0.0)[0]
            raise ConfigError(f"{_join(path, key)} is unknown: did you mean {_join(path, nearest)}?")
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
            raise ConfigError(f"{path}={value!r} is not allowed: a list is")
        return tuple(_convert(typing.get_args(hint)[0], entry, f"{path}[{i}]") for i, entry in enumerate(value))
    if isinstance(hint, types.UnionType):  # str | None or float | None
        return None if value is None else _convert(typing.get_args(hint)[0], value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # a run's folder may be called 2026
    if type(value) is not hint:
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[hint]
        raise ConfigError(f"{path}={value!r} is not allowed: {kind} is")
    return value


def _convert_datasets(value: Any, path: str) -> tuple[DatasetConfig, ...]:
    if isinstance(value, str):
        return (DatasetConfig(prefix=value),)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ConfigError(f"{path}={value!r} is not allowed: a PREFIX or a list of {{prefix, weight}} is")
    return tuple(
        DatasetConfig(prefix=entry) if isinstance(entry, str) else build_section(DatasetConfig, entry, f"{path}[{i}]")
        for i, entry in enumerate(value)
    )
