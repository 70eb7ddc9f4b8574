"""TODO: what native is."""
