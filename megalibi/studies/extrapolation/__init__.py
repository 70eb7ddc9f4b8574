"""TODO: what extrapolation is."""
