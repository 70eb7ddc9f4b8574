"""TODO: what backends is."""
