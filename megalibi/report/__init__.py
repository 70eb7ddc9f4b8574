"""Metrics, their writers, plots and the report page."""

from megalibi.metrics.records import (
    RunMetrics,
    StepRecord,
    ValidationRecord,
    memory_bytes,
    memory_peak_bytes,
    read_metrics,
)
from megalibi.metrics.writers import Writers, build_writers

__all__ = [
    "RunMetrics",
    "StepRecord",
    "ValidationRecord",
    "Writers",
    "build_writers",
    "memory_bytes",
    "memory_peak_bytes",
    "read_metrics",
]
