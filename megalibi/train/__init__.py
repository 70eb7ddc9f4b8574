"""TODO: what train is."""
