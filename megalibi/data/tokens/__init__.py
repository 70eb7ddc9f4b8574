"""TODO: what tokens is."""
