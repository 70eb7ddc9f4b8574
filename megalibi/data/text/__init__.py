"""TODO: what text is."""
