"""TODO: what evaluate is."""
