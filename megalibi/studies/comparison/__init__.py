"""TODO: what comparison is."""
