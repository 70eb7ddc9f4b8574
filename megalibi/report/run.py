"""A run's folder as the report reads it: configuration, metrics and evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalibi.config.yaml_text import SavedLoader, parse_yaml, read_yaml
from megalibi.errors import ConfigError
from megalibi.evaluate.result import EVALUATION_PATTERN, Evaluation, read_evaluation
from megalibi.files import read_json_object
from megalibi.metrics.records import CONFIG_FILE, INFO_FILE, METRICS_FILE, RunMetrics, read_metrics


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a report says about one run."""

    name: str
    """The folder's name."""
    config: dict[str, Any]
    """config.yaml as nested plain values; empty if there is none."""
    info: dict[str, Any]
    """run_info.json: parameter count, environment; empty if there is none."""
    metrics: RunMetrics
    """The recorded steps and validations."""
    evaluations: tuple[Evaluation, ...]
    """The evaluation files of the folder, by name."""


def read_run(run_dir: Path | str) -> Run:
    """Read a run's folder.

    Args:
        run_dir: The run's folder (train.output_dir).

    Raises:
        ConfigError: The folder is missing or no run's, or a file in it cannot be read.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise ConfigError(f"run {folder}: no such folder; give a run's folder (its train.output_dir)")
    if not (folder / CONFIG_FILE).exists() and not (folder / METRICS_FILE).exists():
        raise ConfigError(
            f"run {folder}: holds neither {CONFIG_FILE} nor {METRICS_FILE}; give a run's folder (its train.output_dir)"
        )
    return Run(
        name=folder.resolve().name,
        config=_read_config(folder / CONFIG_FILE),
        info=read_json_object(folder / INFO_FILE) if (folder / INFO_FILE).exists() else {},
        metrics=read_metrics(folder),
        evaluations=tuple(read_evaluation(path) for path in sorted(folder.glob(EVALUATION_PATTERN))),
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    # As save_config wrote it: the spelling of a text is no number's there.
    tree = parse_yaml(read_yaml(path), SavedLoader, f"{path} is not a valid configuration")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} is not a configuration: a mapping of sections is expected")
    return {str(section): fields for section, fields in tree.items()}
