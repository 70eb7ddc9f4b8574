"""A run as a page: facts, plots, HTML."""
