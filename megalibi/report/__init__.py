"""Metrics, their writers, plots and the report page."""
