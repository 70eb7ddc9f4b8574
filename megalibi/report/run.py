"""The folder of a run, read for its report: configuration, metrics and evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalibi.config.yaml_text import SavedLoader, parse_yaml, read_yaml
from megalibi.errors import CheckpointError, ConfigError
from megalibi.evaluate.result import EVALUATION_PATTERN, Evaluation, read_evaluation
from megalibi.files import read_json_object
from megalibi.metrics.records import CONFIG_FILE, INFO_FILE, METRICS_FILE, RunMetrics, read_metrics


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a report says about one run."""

    name: str
    """Name of the run's folder."""
    config: dict[str, Any]
    """Content of config.yaml as nested plain values; empty if there is no such file."""
    info: dict[str, Any]
    """Content of run_info.json; empty if there is no such file."""
    metrics: RunMetrics
    """The recorded steps and validations of the run."""
    evaluations: tuple[Evaluation, ...]
    """Evaluations of the folder, in the order of their file names."""


def read_run(run_dir: Path | str) -> Run:
    """Read a run's folder.

    Args:
        run_dir: The run's folder (train.output_dir).

    Raises:
        ConfigError: The folder is missing or is not that of a run, or config.yaml is not valid YAML.
        CheckpointError: The content of a file in the folder is not what a run writes.
        FileError: A file in the folder cannot be read.
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
    # The loader of what save_config writes: a text that looks like a number stays a text.
    tree = parse_yaml(read_yaml(path), SavedLoader, f"{path} is not a valid configuration")
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: must be a mapping of sections, as a run writes it")
    return {str(section): fields for section, fields in tree.items()}
