"""TODO: what machinery is."""
