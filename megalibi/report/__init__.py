"""The report of a run: facts, figures and one HTML page."""
