"""TODO: what metrics is."""
