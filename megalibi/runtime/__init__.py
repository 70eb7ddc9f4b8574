"""TODO: what runtime is."""
