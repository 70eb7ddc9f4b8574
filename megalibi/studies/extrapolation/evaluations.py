"""The evaluations of an extrapolation study: which there are, and what they found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megalibi.config import Config
from megalibi.evaluate.result import EvaluationResult, read_evaluation
from megalibi.studies.extrapolation.study import NONOVERLAPPING, PROTOCOLS, SLIDING, ExtrapolationStudy, method_config
from megalibi.studies.machinery.machine import Machine
from megalibi.studies.machinery.scorings import Scoring

ResultsByMethod = Mapping[str, Mapping[str, Mapping[int, EvaluationResult]]]
"""Protocol -> position method -> evaluation length -> result."""


def plan_evaluations(
    study: ExtrapolationStudy, base: Config, checkpoints: Mapping[str, Path], machine: Machine
) -> list[Scoring]:
    """Return all evaluations: quick ones first, sliding ones length by length: an interruption costs little.

    Args:
        study: The section ``study``.
        base: The study's run.
        checkpoints: The checkpoint to evaluate, by position method.
        machine: Where to evaluate.
    """
    calls = [
        *((NONOVERLAPPING, method, study.lengths_of(method)) for method in study.methods),
        *((SLIDING, method, (n,)) for n in study.lengths for method in study.methods if n in study.lengths_of(method)),
    ]
    return [
        Scoring(
            label=method,
            checkpoint=checkpoints[method],
            data=base.data.valid[0].prefix,
            protocol=protocol,
            stride=study.stride if protocol == SLIDING else None,
            tokens=study.tokens_of(protocol),
            lengths=lengths,
            output=evaluation_path(base, method, protocol),
            machine=machine,
        )
        for protocol, method, lengths in calls
    ]


def evaluation_path(base: Config, method: str, protocol: str) -> Path:
    """Return the file of a run's evaluations by a protocol; it is in the run's folder, where its report finds it."""
    return Path(method_config(base, method).train.output_dir) / f"evaluation_{protocol}.json"


def read_evaluations(study: ExtrapolationStudy, base: Config) -> ResultsByMethod:
    """Return every result that the study asks for."""
    results: dict[str, dict[str, dict[int, EvaluationResult]]] = {}
    for protocol in PROTOCOLS:
        for method in study.methods:
            known = {row.length: row for row in read_evaluation(evaluation_path(base, method, protocol)).results}
            rows = {length: known[length] for length in study.lengths_of(method)}
            results.setdefault(protocol, {})[method] = rows
    return results
