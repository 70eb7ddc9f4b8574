"""TODO: what plan is."""
